// A panel as a picture or as a table of the numbers it draws.

import { download } from "./dom.js";
import { dressed } from "./figure.js";

/** Saves a drawn figure as png or svg, on white and under its title. */
export async function picture(plot, figure, name, format) {
  const layout = dressed(figure.layout, "light", { saved: true });
  const { width, height } = plot.getBoundingClientRect();
  // The page shows titles itself; a picture carries its own, so it is that much higher.
  const size = { width: Math.max(640, Math.round(width)), height: Math.round(height) + 44 };
  const url = await Plotly.toImage({ data: figure.data, layout: { ...layout, ...size } }, { format, scale: format === "png" ? 2 : 1, ...size });
  download(`${name}.${format}`, url);
}

/** Saves the numbers of a drawn figure as comma separated values. */
export function table(plot, name) {
  const blob = new Blob([csv(plot)], { type: "text/csv" });
  const url = URL.createObjectURL(blob);
  download(`${name}.csv`, url);
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

/** One row for every point: its series, its coordinates and, of a map, its value. */
export function csv(plot) {
  const { _fullLayout: layout, _fullData: data } = plot;
  // Maps of samples are sorted by class; a table names the samples themselves.
  const order = layout.meta?.order;
  const named = (place) => order?.[place] ?? place;
  const single = !layout.yaxis2;
  const titled = (key, other) => (order ? "sample" : single && layout[key]?.title?.text?.replace(/<[^>]*>/g, " ")) || other;
  const maps = data.some((trace) => trace.z);
  const lines = [["series", titled("xaxis", "x"), titled("yaxis", "y"), ...(maps ? ["value"] : [])]];
  for (const trace of data) {
    if (trace.z) {
      trace.z.forEach((row, i) => row.forEach((value, j) => lines.push([trace.name, named(trace.x?.[j] ?? j), named(trace.y?.[i] ?? i), value])));
    } else {
      const length = Math.max(trace.x?.length ?? 0, trace.y?.length ?? 0);
      for (let i = 0; i < length; i++) lines.push([trace.name, trace.x?.[i] ?? i, trace.y?.[i] ?? i, ...(maps ? [null] : [])]);
    }
  }
  return lines.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}

function cell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  if (typeof value === "number") return String(value);
  // A spreadsheet would run a name that begins like a formula.
  const text = String(value).replace(/^(?=[=+\-@\t])/, "'");
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
