// Where TensorBoard enters: it imports this module inside the tab's frame and calls render().
import { start } from "./static/app.js";

export function render() {
  return start(document.body);
}
