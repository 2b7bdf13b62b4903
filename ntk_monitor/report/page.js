"use strict";
const specs = JSON.parse(document.getElementById("figures").textContent);
const others = JSON.parse(document.getElementById("others").textContent);
const root = document.documentElement;

function colours() {
  const style = getComputedStyle(root);
  return { ink: style.getPropertyValue("--ink").trim(), edge: style.getPropertyValue("--edge").trim() };
}

// Figures carry no colours of the page; axes and words follow the theme.
function themed(layout, wide) {
  const { ink, edge } = colours();
  const dressed = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true };
  dressed.font = { ...(layout.font || {}), color: ink };
  dressed.title = { ...(layout.title || {}), font: { size: 15 }, x: 0.015, xref: "container", xanchor: "left" };
  // Panels of a wide figure bring headings of their own, which need room under the title.
  dressed.margin = { l: 62, r: 16, t: wide ? 92 : 46, b: 60, ...(layout.margin || {}) };
  if (wide) dressed.title = { ...dressed.title, y: 0.99, yanchor: "top" };
  dressed.modebar = { bgcolor: "rgba(0,0,0,0)", color: edge, activecolor: ink };
  for (const key of new Set([...Object.keys(layout), "xaxis", "yaxis"])) {
    if (/^[xy]axis/.test(key)) {
      dressed[key] = { gridcolor: edge, zerolinecolor: edge, linecolor: edge, automargin: true, ...(layout[key] || {}) };
    }
  }
  return dressed;
}

function save(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// What is drawn as a table: one row per point of a line, or per cell of a heat map.
function csv(traces) {
  const quoted = (value) => (value === null || value === undefined ? "" : `"${String(value).replaceAll('"', '""')}"`);
  const rows = [["trace", "x", "y", "z"]];
  for (const trace of traces) {
    if (trace.z) trace.z.forEach((row, j) => row.forEach((z, i) => rows.push([trace.name, trace.x[i], trace.y[j], z])));
    else trace.x.forEach((x, i) => rows.push([trace.name, x, trace.y[i], ""]));
  }
  return rows.map((row) => row.map(quoted).join(",")).join("\n");
}

const options = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["lasso2d", "select2d"],
  modeBarButtonsToAdd: [
    { name: "SVG", title: "Save as SVG", icon: Plotly.Icons.disk,
      click: (place) => Plotly.downloadImage(place, { format: "svg", filename: place.id, width: place.clientWidth, height: place.clientHeight }) },
    { name: "CSV", title: "Save the numbers as CSV", icon: Plotly.Icons.tooltip_basic, click: (place) => save(`${place.id}.csv`, csv(spec(place).data)) },
  ],
};

// What a place shows: its figure, or the one that was chosen for its run.
function spec(place) {
  const turned = others[place.id];
  const chosen = Number(place.dataset.chosen ?? -1);
  return (turned && turned[chosen]) || specs[place.id];
}

// Lines and dots that are black on paper take the ink of the theme.
const BLACK = new Set(["#000000", "#111111", "#333333"]);
function inked(traces) {
  const { ink } = colours();
  const black = (trace, part) => trace[part] && BLACK.has(trace[part].color);
  return traces.map((trace) => ["line", "marker"].filter((part) => black(trace, part)).reduce(
    (turned, part) => ({ ...turned, [part]: { ...trace[part], color: ink } }), trace,
  ));
}

function draw(place) {
  const figure = spec(place);
  if (figure) {
    Plotly.react(place, inked(figure.data), themed(figure.layout, place.parentElement.classList.contains("wide")), options);
    place.dataset.drawn = "yes";
  }
}

function choose(control) {
  const axis = control.dataset.axis;
  const shown = control.parentElement.querySelector("output");
  if (shown) shown.textContent = control.dataset.names.split("|")[control.value];
  for (const place of control.closest(".run").querySelectorAll(`.plot[data-axis="${axis}"]`)) {
    place.dataset.chosen = control.value;
    if (place.dataset.drawn) draw(place);
  }
}

for (const control of document.querySelectorAll(".controls [data-axis]")) {
  control.addEventListener(control.tagName === "SELECT" ? "change" : "input", () => choose(control));
}
for (const button of document.querySelectorAll(".controls .play")) {
  let timer = null;
  button.addEventListener("click", () => {
    const slider = button.parentElement.querySelector("input");
    clearInterval(timer);
    button.textContent = timer === null ? "■" : "▶";
    timer = timer === null ? setInterval(() => {
      slider.value = (Number(slider.value) + 1) % (Number(slider.max) + 1);
      choose(slider);
    }, 900) : null;
  });
}

// What is out of view is drawn anew when it comes into view.
function redraw() {
  for (const place of document.querySelectorAll('.plot[data-drawn="yes"]')) {
    delete place.dataset.drawn;
    seen.unobserve(place);
    seen.observe(place);
  }
}

function theme(name) {
  root.dataset.theme = name;
  redraw();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", (event) => theme(event.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));

// A page of many runs draws what comes into view, and everything before it is printed.
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }
}, { rootMargin: "600px" });
for (const place of document.querySelectorAll(".plot")) seen.observe(place);
addEventListener("beforeprint", () => {
  for (const place of document.querySelectorAll(".plot")) draw(place);
});
