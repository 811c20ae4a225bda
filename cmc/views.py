"""The views that CMC contrasts: the flag that names them, their branches, and the graph of their pairs (arXiv 1906.05849)."""

from argparse import Action, Namespace

from cmc.color import SPACES, space_of, view_names


class Views(Action):
    """--space SPACE or --views PART PART ...: two forms of one flag."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = values if isinstance(values, str) else " ".join(values)
        if isinstance(values, str) and values not in SPACES and "+" not in values:
            parser.error(f"{option_string} {given}: is no colour space; pass one of {', '.join(SPACES)}")
        try:
            setattr(namespace, self.dest, space_of(view_names(values) if isinstance(values, str) else values))
        except ValueError as error:
            parser.error(f"{option_string} {given}: {error}")


def branch_names(space: str) -> dict[str, str]:
    """View -> name of its branch. The two views of any space have the published names."""
    views = view_names(space)
    names = ["l_to_ab", "ab_to_l"] if space in SPACES else [f"view_{view}" for view in views]
    return dict(zip(views, names, strict=True))


def bank_names(space: str) -> list[str]:
    return ["l", "ab"] if space in SPACES else view_names(space)


def graph_pairs(views: int, graph: str) -> list[tuple[int, int]]:
    """(query, bank): both directions of each edge. full: any two views have an edge; core: the first with each other one."""
    edges = [(i, j) for i in range(views if graph == "full" else 1) for j in range(i + 1, views)]
    return [pair for i, j in edges for pair in ((i, j), (j, i))]


def chosen(args: Namespace) -> list[str]:
    """The views of --only-views, in the order of the training; all without this flag, as in a training. Raises ValueError."""
    views = view_names(args.space)
    only = vars(args).get("only_views") or views
    if other := [name for name in only if name not in views]:
        raise ValueError(f"--only-views {other[0]}: the views are {' '.join(views)}; pass some of them")
    return [name for name in views if name in only]
