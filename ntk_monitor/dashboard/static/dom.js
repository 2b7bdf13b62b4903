// Elements. Whatever a run is called arrives as text, never as markup: nothing here parses HTML.

export function h(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function slug(text) {
  return text.replace(/[^a-z0-9]+/gi, "-").toLowerCase();
}

/** The words of a text in plotly's little markup. */
export function plainWords(text) {
  const bare = String(text ?? "").replace(/<[^>]*>/g, " ").replace(/\s+/g, " ").trim();
  return bare.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

/** Three significant digits, and powers of ten where more than six would be needed. */
export function short(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (!Number.isFinite(value)) return value > 0 ? "∞" : value < 0 ? "-∞" : "–";
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(1).replace("e+", "e");
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
}

/** Index of the number nearest to `value` in an increasing list; -1 for an empty one. */
export function nearest(list, value) {
  let best = -1;
  list.forEach((one, i) => {
    if (best < 0 || Math.abs(one - value) < Math.abs(list[best] - value)) best = i;
  });
  return best;
}

/** Hands the browser a file to save. */
export function download(name, url) {
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
