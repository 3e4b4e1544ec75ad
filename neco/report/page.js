"use strict";
// The cosine similarity of a chosen patch with every patch of the images shown, of two networks side by side.
(() => {
  const data = JSON.parse(document.getElementById("similarity-data").textContent);
  const root = document.getElementById("maps"), pairs = root.querySelector(".pairs");
  const choices = [...root.querySelectorAll("select")], own = root.querySelector("input"), told = root.querySelector("output");
  const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], NEAREST = 30;
  const bytes = (text) => { const raw = atob(text), out = new Uint8Array(raw.length); for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i); return out; };
  const ready = (net) => {  // decoded when first looked at
    if (net.vectors) return net;
    net.vectors = new Int8Array(bytes(net.data).buffer);
    net.classes = bytes(net.labels);
    net.count = net.grid[0] * net.grid[1];
    net.norms = Float64Array.from({length: net.vectors.length / net.dim}, (_, i) => {
      let sum = 0;
      for (let d = i * net.dim; d < (i + 1) * net.dim; d++) sum += net.vectors[d] ** 2;
      return Math.sqrt(sum) || 1;
    });
    return net;
  };
  // Cosines of a patch (its number among those of all images) with all patches.
  const cosines = (net, patch) => {
    const {vectors, dim, norms} = ready(net), query = vectors.subarray(patch * dim, (patch + 1) * dim);
    return Float32Array.from(norms, (norm, i) => {
      let sum = 0;
      for (let d = 0, at = i * dim; d < dim; d++) sum += query[d] * vectors[at + d];
      return sum / (norm * norms[patch]);
    });
  };
  window.similarity = (network, patch) => [...cosines(data.networks[network], patch)];  // for tests and the curious

  const place = (mark, net, patch) => {
    const [h, w] = net.grid, row = Math.floor(patch / w), column = patch % w;
    Object.assign(mark.style, {left: `${100 * (column + 0.5) / w}%`, top: `${100 * (row + 0.5) / h}%`, width: `${100 / w}%`, height: `${100 / h}%`});
  };
  const maps = [[], []];
  let chosen = data.start;
  const patchOf = (net) => [Math.floor(chosen.y * net.grid[0]), Math.floor(chosen.x * net.grid[1])];

  const draw = () => {
    const lines = [];
    choices.forEach((choice, side) => {
      const net = ready(data.networks[choice.value]), [h, w] = net.grid, [row, column] = patchOf(net);
      const patch = chosen.image * net.count + row * w + column, values = cosines(net, patch);
      const low = own.checked ? values.reduce((a, b) => Math.min(a, b)) : 0;
      maps[side].forEach(({canvas, mark, best, value}, image) => {
        const start = image * net.count;
        Object.assign(canvas, {width: w, height: h});
        const context = canvas.getContext("2d"), pixels = context.createImageData(w, h);
        let top = start;
        for (let i = 0; i < net.count; i++) {
          const cosine = values[start + i], part = Math.max(0, Math.min(0.9999, (cosine - low) / (1 - low || 1))) * 4;
          const at = Math.floor(part), mix = part - at;
          if (start + i !== patch && (cosine > values[top] || top === patch)) top = start + i;
          for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = STOPS[at][c] * (1 - mix) + STOPS[at + 1][c] * mix;
          pixels.data[4 * i + 3] = 160;
        }
        context.putImageData(pixels, 0, 0);
        mark.hidden = image !== chosen.image;
        place(mark, net, row * w + column);
        place(best, net, top - start);
        value.textContent = values[top].toFixed(2);
      });
      const others = [...values.keys()].filter((i) => Math.floor(i / net.count) !== chosen.image && net.classes[i] !== 255);
      const nearest = others.sort((a, b) => values[b] - values[a]).slice(0, NEAREST), kind = net.classes[patch];
      const same = nearest.filter((i) => net.classes[i] === kind).length;
      lines.push(`${net.name}: ` + (!data.classes.length ? "these images have no labels." : kind === 255 ? "the patch has no class." :
        !nearest.length ? `the patch is ${data.classes[kind]}; there is no other image.` :
        `${same} of the ${nearest.length} nearest patches in other images are ${data.classes[kind]}, as this one.`));
      root.querySelectorAll(".scale b")[side].textContent = low.toFixed(2);
    });
    const [row, column] = patchOf(data.networks[choices[0].value]);
    told.replaceChildren(...[`${data.images[chosen.image].key}, row ${row + 1}, column ${column + 1}.`, ...lines].map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
  };

  const element = (name, parent, settings = {}) => parent.appendChild(Object.assign(document.createElement(name), settings));
  data.images.forEach(({key, image}, number) => {
    const pair = element("div", pairs), values = [];
    for (const side of [0, 1]) {
      const map = element("button", pair, {type: "button", className: "map", tabIndex: side ? -1 : 0});
      map.setAttribute("aria-label", `${key}, ${side ? "right" : "left"} network: choose a patch; arrow keys move it`);
      element("img", map, {src: image, alt: ""});
      const held = {canvas: element("canvas", map), best: element("i", map, {className: "best"}), mark: element("i", map)};
      map.addEventListener("click", (event) => {
        const box = map.getBoundingClientRect(), inside = (v) => Math.max(0, Math.min(0.9999, v));
        const pointed = event.detail > 0;  // else by the keyboard
        chosen = {image: number, x: pointed ? inside((event.clientX - box.left) / box.width) : 0.5, y: pointed ? inside((event.clientY - box.top) / box.height) : 0.5};
        draw();
      });
      map.addEventListener("keydown", (event) => {
        const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] || [0, 0];
        if (!dx && !dy) return;
        event.preventDefault();
        const net = data.networks[choices[side].value], [h, w] = net.grid, [row, column] = patchOf(net);
        const moved = (at, count) => (Math.max(0, Math.min(count - 1, at)) + 0.5) / count;
        chosen = {image: number, x: moved(column + dx, w), y: moved(row + dy, h)};
        draw();
      });
      maps[side].push(held);
      values.push(held);
    }
    const caption = element("p", pair, {textContent: `${key}: best match `});
    values.forEach((held, side) => {
      if (side) caption.append(" and ");
      held.value = element("span", caption);
    });
  });
  [...choices, own].forEach((control) => control.addEventListener("change", draw));
  draw();
})();
