// A model without a kernel: what a widget's script asks of Jupyter, in a page of its own. Follows the script, whose `render` it calls.
class Model {
  #state;
  #listeners = new Map();
  constructor(state) { this.#state = state; }
  get(name) { return this.#state[name]; }
  set(name, value) {
    if (this.#state[name] === value) return;
    this.#state[name] = value;
    this.#call(`change:${name}`);
  }
  on(event, listener) { this.#listeners.set(event, [...(this.#listeners.get(event) ?? []), listener]); }
  off(event, listener) { this.#listeners.set(event, (this.#listeners.get(event) ?? []).filter((one) => listener && one !== listener)); }
  save_changes() {}
  send() {}
  #call(event) { for (const listener of this.#listeners.get(event) ?? []) listener(); }
}

function revive(_, value) {
  if (value === null || typeof value.base64 !== "string") return value;
  return new DataView(Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0)).buffer);
}

const widget = document.getElementById("widget");
widget.model = new Model(JSON.parse(document.getElementById("state").textContent, revive));
render({ model: widget.model, el: widget });
