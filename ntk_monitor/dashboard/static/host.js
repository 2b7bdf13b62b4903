// TensorBoard around the frame: when it has reloaded, and whether it is dark. The page works without either.

/** Calls `reloaded` after TensorBoard's own reload. Six lines of the protocol of its experimental plugin library. */
export function listen(reloaded) {
  const channel = new MessageChannel();
  channel.port1.onmessage = (event) => {
    const { type, id, isReply } = JSON.parse(event.data);
    if (isReply) return;
    if (type === "experimental.DataReloaded") reloaded();
    channel.port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
  };
  window.parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}

/** Whether TensorBoard, or else the browser, is dark. */
export function dark() {
  try {
    if (parent !== window) return parent.document.body.classList.contains("dark-mode");
  } catch { /* another origin */ }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Calls `changed` whenever the answer of `dark` may be another one. */
export function watch(changed) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
  try {
    const observer = new MutationObserver(changed);
    if (parent !== window) observer.observe(parent.document.body, { attributeFilter: ["class"] });
  } catch { /* another origin */ }
}

/** Whether anybody can see the page: TensorBoard hides the frames of other tabs. */
export function seen() {
  return document.visibilityState === "visible" && innerWidth > 0;
}
