// Questions to the plugin. Addresses are relative to this module, so that they hold under --path_prefix.

export function address(route, parameters = {}) {
  const url = new URL(`../${route}`, import.meta.url);
  for (const [key, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== null && one !== undefined) url.searchParams.append(key, one);
    }
  }
  return url.href;
}

export async function ask(url) {
  const response = await fetch(url);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `TensorBoard answered ${response.status}`);
  return answer;
}

export function script(url) {
  return new Promise((resolve, reject) => {
    const node = document.createElement("script");
    node.src = url;
    node.onload = resolve;
    node.onerror = () => reject(new Error("plotly.js is missing; pip install plotly where TensorBoard runs"));
    document.head.append(node);
  });
}
