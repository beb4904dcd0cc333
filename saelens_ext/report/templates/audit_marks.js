// Marks of modes, and figures as report/audit/wording.py writes them.

const MARKS = 8;

function colourOf(mark) {
  return `colour-${mark % MARKS}`;
}

function shapeOf(mark) {
  return byId(`shape-${Math.floor(mark / MARKS)}`).firstElementChild.getAttribute("d");
}

// A mode's mark beside text.
function inlineMark(mark) {
  const use = draw("use", { href: `#shape-${Math.floor(mark / MARKS)}` });
  return draw("svg", { class: `mark ${colourOf(mark)}`, "aria-hidden": "true" }, use);
}

// Decimals at which the largest of some figures has `digits` significant digits.
function decimalsOf(values, digits) {
  const largest = Math.max(0, ...values.filter((value) => value !== null).map(Math.abs));
  return largest === 0 ? 0 : Math.min(6, Math.max(0, digits - 1 - Math.floor(Math.log10(largest))));
}

// A figure with its interval, at two digits of the interval's width.
function formatInterval([value, low, high]) {
  if (value === null) return "–";
  const known = low !== null && high !== null && high > low;
  const decimals = known ? decimalsOf([high - low], 2) : decimalsOf([value], 3);
  const middle = formatFixed(value, decimals, true);
  return known ? `${middle} (${formatFixed(low, decimals, true)} to ${formatFixed(high, decimals, true)})` : middle;
}
