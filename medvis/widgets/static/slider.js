// A slider whose handle has a name, which ipywidgets' own lacks. It answers the keys itself: JupyterLab takes them from a range input.
const STEPS = { ArrowRight: 1, ArrowUp: 1, PageUp: 10, End: Infinity, ArrowLeft: -1, ArrowDown: -1, PageDown: -10, Home: -Infinity };

function render({ model, el }) {
  const label = Object.assign(document.createElement("label"), { className: "medvis slider" });
  const [name, input, output] = ["span", "input", "output"].map((tag) => label.appendChild(document.createElement(tag)));
  Object.assign(input, { type: "range", step: 1 });
  const show = () => {
    const value = model.get("value"), words = model.get("names")[value - model.get("low")] ?? String(value);
    name.textContent = model.get("description");
    input.min = model.get("low");
    input.max = model.get("high");
    input.value = value;
    output.textContent = words;
    input.setAttribute("aria-label", model.get("description"));
    input.setAttribute("aria-valuetext", words);
  };
  const traits = ["description", "low", "high", "names", "value"].map((trait) => `change:${trait}`);
  for (const event of traits) model.on(event, show);
  const give = (value) => {
    model.set("value", Math.min(model.get("high"), Math.max(model.get("low"), value)));
    model.save_changes();
  };
  input.addEventListener("input", () => give(input.valueAsNumber));
  input.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    give(model.get("value") + STEPS[event.key]);
  });
  show();
  el.append(label);
  el.dataset.ready = "1";
  return () => { for (const event of traits) model.off(event, show); };
}

export default { render };
