// What the browser does by itself: opacity, sign, the read-out under the pointer, the divider. Nothing here asks the server;
// what does is numbered, for two questions may overtake each other on their way.
window.pysal = { asked: 0, ask() { return ++this.asked; } };

(() => {
  const root = document.documentElement;
  root.dataset.sign = "own";

  const decoded = new WeakMap();
  function numbers(element, name, type) {
    const known = decoded.get(element) ?? {};
    if (!(name in known)) {
      const bytes = Uint8Array.from(atob(element.dataset[name]), (character) => character.charCodeAt(0));
      known[name] = new type(bytes.buffer);
      decoded.set(element, known);
    }
    return known[name];
  }

  function shown(tile) {
    const sign = root.dataset.sign;
    return sign === "own" ? (tile.classList.contains("signed-own") ? "signed" : "unsigned") : sign;
  }

  function size(picture) {
    const layer = picture.querySelector("img.layer");
    return [layer?.naturalWidth ?? 0, layer?.naturalHeight ?? 0];
  }

  // The same place in all pictures of a page, and what each map says there.
  function point(container, x, y) {
    for (const tile of container.querySelectorAll(".tile")) {
      const picture = tile.querySelector(".picture");
      const [width, height] = size(picture);
      if (!width) continue;
      picture.style.setProperty("--x", `${100 * x}%`);
      picture.style.setProperty("--y", `${100 * y}%`);
      const kind = shown(tile);
      const layer = picture.querySelector(`img.${kind}`);
      const at = Math.min(Math.floor(y * height), height - 1) * width + Math.min(Math.floor(x * width), width - 1);
      const share = numbers(layer, "values", Int8Array)[at] / 127;
      const output = tile.querySelector("output");
      if (output) output.textContent = Number((share * Number(layer.dataset.bound)).toPrecision(2)).toString().replace("-", "−");
      const mark = tile.querySelector(`.scale.${kind} .ramp i`);
      if (mark) mark.style.left = `${kind === "signed" ? 50 + 50 * share : 100 * share}%`;
    }
    container.classList.add("pointing");
  }

  // A segment is hidden under the pointer: black, with a white outline, and what its absence does to the answer.
  function hide(picture, segment, x, y) {
    const told = picture.querySelector(".told");
    const canvas = picture.querySelector("canvas");
    if (!told || !canvas || picture.dataset.segment === String(segment)) {
      if (told && x !== undefined) place(told, x, y);
      return;
    }
    picture.dataset.segment = String(segment);
    const drawing = canvas.getContext("2d");
    drawing.clearRect(0, 0, canvas.width, canvas.height);
    told.hidden = segment < 0;
    picture.classList.toggle("hiding", segment >= 0);
    for (const line of document.querySelectorAll(".pysal .ranking li")) {
      line.classList.toggle("lit", Number(line.dataset.segment) === segment);
    }
    if (segment < 0) return;
    const labels = numbers(picture, "labels", Int16Array);
    const pixels = drawing.createImageData(canvas.width, canvas.height);
    let count = 0, middleX = 0, middleY = 0;
    for (let at = 0; at < labels.length; at++) {
      if (labels[at] !== segment) continue;
      const column = at % canvas.width, row = (at - column) / canvas.width;
      count++; middleX += column; middleY += row;
      const edge = column === 0 || row === 0 || column === canvas.width - 1 || row === canvas.height - 1 ||
        labels[at - 1] !== segment || labels[at + 1] !== segment ||
        labels[at - canvas.width] !== segment || labels[at + canvas.width] !== segment;
      pixels.data.set(edge ? [255, 255, 255, 255] : [0, 0, 0, 235], 4 * at);
    }
    drawing.putImageData(pixels, 0, 0);
    told.textContent = picture.dataset.falls.split("|")[segment];
    place(told, x ?? (middleX / count + 0.5) / canvas.width, y ?? (middleY / count + 0.5) / canvas.height);
  }

  function place(told, x, y) {
    told.style.setProperty("--left", `${100 * x}%`);
    told.style.top = `${100 * (y > 0.16 ? y - 0.1 : y + 0.1)}%`;
  }

  function leave(container) {
    container.classList.remove("pointing");
    for (const picture of container.querySelectorAll(".picture[data-labels]")) hide(picture, -1);
    for (const output of container.querySelectorAll("output")) output.textContent = "";
  }

  let current = null;
  function pointed(event) {
    const picture = event.target.closest?.(".pysal.tiles .tile:not(.swipe) .picture");
    const container = picture?.closest(".pysal.tiles") ?? null;
    if (current && current !== container) leave(current);
    current = container;
    const line = event.target.closest?.(".pysal .ranking li");
    if (line) {
      const target = line.closest(".pysal.tiles").querySelector(".picture[data-labels]");
      if (target) { current = line.closest(".pysal.tiles"); hide(target, Number(line.dataset.segment)); }
      return;
    }
    if (!picture) return;
    const box = picture.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    if (x < 0 || x > 1 || y < 0 || y > 1) return;
    point(container, x, y);
    if (picture.dataset.labels) {
      const [width, height] = size(picture);
      const at = Math.min(Math.floor(y * height), height - 1) * width + Math.min(Math.floor(x * width), width - 1);
      hide(picture, numbers(picture, "labels", Int16Array)[at], x, y);
    } else {
      for (const other of container.querySelectorAll(".picture[data-labels]")) hide(other, -1);
    }
  }
  document.addEventListener("pointermove", pointed);
  document.addEventListener("pointerdown", pointed);  // a tap moves nothing

  // By keyboard: arrow keys move the point in a picture, by a 28th of it or, with Shift, by a pixel; Escape leaves it.
  document.addEventListener("keydown", (event) => {
    const picture = event.target.closest?.(".pysal.tiles .tile:not(.swipe) .picture");
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [0, 0] };
    if (!picture || event.target !== picture || !(event.key in steps || event.key === "Escape")) return;
    event.preventDefault();
    const container = picture.closest(".pysal.tiles");
    if (event.key === "Escape") return leave(container);
    const [width, height] = size(picture);
    if (!width) return;
    const [right, down] = steps[event.key];
    const [x, y] = (event.key === "Home" ? null : picture.point) ?? [0.5, 0.5];
    const within = (at, step, pixels) => Math.min(Math.max(at + step * (event.shiftKey ? 1 / pixels : 1 / 28), 0.5 / pixels), 1 - 0.5 / pixels);
    picture.point = [within(x, right, width), within(y, down, height)];
    const box = picture.getBoundingClientRect();
    current = container;
    pointed({ target: picture, clientX: box.left + picture.point[0] * box.width, clientY: box.top + picture.point[1] * box.height });
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.closest?.(".pysal .ranking li")) pointed(event);
  });
  document.addEventListener("focusout", (event) => {
    if (current && !current.contains(event.relatedTarget)) leave(current);
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".pysal .enlarge");
    if (!button) return;
    const large = button.closest(".tile").classList.toggle("large");
    button.setAttribute("aria-expanded", String(large));
  });

  document.addEventListener("input", (event) => {
    const picture = event.target.closest?.(".pysal .swipe .picture");
    if (picture) picture.style.setProperty("--divider", `${event.target.value}%`);
  });
})();
