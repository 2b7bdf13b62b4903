// Plotly specs in the colours of the page. A figure brings data and words; ink, grid and background are the theme's.

const THEMES = {
  light: { ink: "#202a36", soft: "#5d6977", edge: "#e4e8ed", paper: "#ffffff" },
  dark: { ink: "#e3e7ec", soft: "#98a3b0", edge: "#343c46", paper: "#1f252c" },
};

export const OPTIONS = { responsive: false, displayModeBar: false, displaylogo: false };

/** The layout of a figure for a theme; what is saved as a picture keeps its title and has a background. */
export function dressed(layout, theme, { saved = false } = {}) {
  const { ink, soft, edge, paper } = THEMES[theme];
  const found = { ...layout, autosize: !saved, paper_bgcolor: saved ? paper : "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  found.font = { family: "system-ui, Roboto, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 12, ...layout.font, color: ink };
  found.margin = { l: 58, r: 16, t: (saved ? 54 : 14) + (crowned(layout) ? 26 : 0), b: 48, ...layout.margin };
  found.legend = { bgcolor: "rgba(0,0,0,0)", tracegroupgap: 0, ...layout.legend };
  // Legends that lie flat go to the very bottom, under the title of the axis.
  if (layout.legend?.orientation === "h") Object.assign(found.legend, { x: 0, xanchor: "left", y: 0, yanchor: "bottom", yref: "container" });
  found.hoverlabel = { namelength: -1, ...layout.hoverlabel };
  found.annotations = (layout.annotations ?? []).map((one) => ({ ...one, font: { ...one.font, color: soft } }));
  if (saved) found.title = { ...layout.title, font: { size: 16 }, x: 0.01, xanchor: "left" };
  else delete found.title;
  for (const key of new Set([...Object.keys(layout), "xaxis", "yaxis"])) {
    if (!/^[xy]axis\d*$/.test(key)) continue;
    const axis = layout[key] || {};
    found[key] = { gridcolor: edge, zerolinecolor: edge, linecolor: edge, automargin: true, tickcolor: edge, ...axis };
    found[key].tickfont = { color: soft, size: 11, ...axis.tickfont };
    if (axis.title) found[key].title = { standoff: 8, ...axis.title, font: { size: 12, color: soft, ...axis.title.font } };
  }
  return found;
}

/** Whether words stand above the topmost plot of a figure of several. */
function crowned(layout) {
  return (layout.annotations ?? []).some((one) => one.yanchor === "bottom" && one.y >= 0.99);
}
