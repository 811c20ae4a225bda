"use strict";
// Draws the curves of the page with uPlot. Drag to zoom, double click for all; the sliders move all charts.
const COLOURS = ["#3b82f6", "#f97316", "#10b981", "#d946ef", "#eab308", "#ef4444", "#06b6d4", "#8b5cf6"];
const data = JSON.parse(document.getElementById("data").textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const short = v => v == null ? "" : String(+v.toPrecision(4));

// The ends of the vertical axis. uPlot's own are 0 and 100 for a curve that is always 0.
const ends = (_, low, high) => low !== high ? uPlot.rangeNum(low, high, 0.1, true) : low ? [low - Math.abs(low) / 10, low + Math.abs(low) / 10] : [0, 1];

function draw(chart, place) {
  const series = [{label: "epoch", value: (_, v) => short(v)}], columns = [chart.x], bands = [];
  chart.curves.forEach((curve, i) => {
    const colour = COLOURS[i % COLOURS.length];
    const [mean, low, high] = curve.rows;
    series.push({label: curve.name, stroke: colour, width: 1.5, dash: curve.dashed ? [6, 4] : undefined, spanGaps: true,
                 value: (_, v) => short(v), points: {show: mean.filter(v => v != null).length < 40, size: 4}});
    columns.push(mean);
    if (low) {
      for (const row of [high, low]) {
        series.push({label: "", class: "band", stroke: "transparent", width: 0, spanGaps: true, points: {show: false}});
        columns.push(row);
      }
      bands.push({series: [series.length - 2, series.length - 1], fill: colour + "33"});
    }
  });
  for (const [label, value] of chart.references) {
    series.push({label: label, stroke: () => style("--soft"), width: 1, dash: [3, 3], value: (_, v) => short(v), points: {show: false}});
    columns.push(chart.x.map(() => value));
  }
  const axis = () => ({stroke: () => style("--ink"), grid: {stroke: () => style("--line"), width: 1},
                       ticks: {stroke: () => style("--line"), width: 1}, font: "11px system-ui, sans-serif"});
  const values = {...axis(), size: 66, values: (_, marks) => marks.map(short)};
  return new uPlot({width: Math.max(200, place.clientWidth), height: 220, series, bands, axes: [axis(), values],
                    scales: {x: {time: false}, y: {range: ends}}, cursor: {sync: {key: "page"}}}, columns, place);
}

const places = [...document.querySelectorAll("[data-chart]")];
const plots = places.map(place => draw(data.charts[+place.dataset.chart], place));
new ResizeObserver(() => plots.forEach((plot, i) => {
  const width = places[i].clientWidth;
  if (width && width !== plot.width) plot.setSize({width, height: 220});
})).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(plot => plot.redraw(false)));

const [from, to] = document.querySelectorAll(".zoom input");
if (from) {
  const move = () => {
    const ends = [+from.value, +to.value].sort((a, b) => a - b).map(share => share / 1000 * data.last);
    if (ends[1] > ends[0]) plots.forEach(plot => plot.setScale("x", {min: ends[0], max: ends[1]}));
  };
  from.addEventListener("input", move);
  to.addEventListener("input", move);
}
