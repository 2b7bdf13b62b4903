"use strict";
const specs = JSON.parse(document.getElementById("figures").textContent);
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
  dressed.title = { ...(layout.title || {}), font: { size: 15 }, x: 0, xref: "paper", xanchor: "left" };
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

const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

function draw(place) {
  const spec = specs[place.id];
  if (spec) {
    Plotly.react(place, spec.data, themed(spec.layout, place.parentElement.classList.contains("wide")), options);
    place.dataset.drawn = "yes";
  }
}

function redraw() {
  for (const place of document.querySelectorAll('.plot[data-drawn="yes"]')) draw(place);
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
