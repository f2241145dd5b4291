// The widget's front end: draws picture, masks and prompts, and tells the kernel what a hand does.
// It holds no state but the view (zoom, opacity, pointer); all else comes in the traits picture, masks, scene, status.

const POSITIVE = "#009E73", NEGATIVE = "#D55E00"; // Okabe and Ito; disc with plus and square with minus differ in shape
const DRAG = 4; // CSS pixels a pointer moves before a click becomes a box
const PART = 2 ** 21; // bytes of an uploaded file in one message
const SLOW = 250; // milliseconds: three times above, the preview under the pointer switches itself off
const PATIENCE = 8000; // milliseconds without an answer until the status line says so
const MIMES = { ".png": "image/png", ".json": "application/json", ".npz": "application/octet-stream" };

const HELP = {
  "Pointer": [
    ["click", "this belongs to the object"], ["Shift + click", "this does not; also right click"],
    ["drag", "a box around the object"], ["wheel", "zoom, after a click here or with Ctrl"],
    ["Space + drag", "move; also middle button"], ["drop a file", "open your own picture"],
  ],
  "Objects": [
    ["N", "next object"], ["Z", "undo"], ["Y", "redo"], ["Del", "remove the object"], ["C", "clear all"],
    ["1 2 3", "choose among three masks"], ["0", "the model's choice"], ["F", "feed the last mask back"],
  ],
  "View": [
    ["H", "preview under the pointer"], ["+ −", "zoom"], ["R", "whole picture"], ["[ ]", "opacity"], ["?", "this help"],
  ],
  "Without a mouse": [
    ["arrows", "move a cursor; Shift: by one pixel"], ["Enter", "this belongs to the object"],
    ["Shift + Enter", "this does not"], ["B", "a box: first corner, then second"],
  ],
};

/** An element: tag, properties (on*, aria-*, data-* too), children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && !key.includes("-")) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** Bytes as they come from the kernel, to a picture that can be drawn. */
function decoded(bytes) {
  return createImageBitmap(new Blob([bytes]));
}

/** Letters on a color: white on blue, dark on all others, at least 4.5 to 1. */
const ink = (color) => (color === "#0072B2" ? "#fff" : "#111");

function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : value < 2000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(1)} s`;
}

function render({ model, el }) {
  const view = { scale: 1, x: 0, y: 0, fitted: true }; // CSS pixel = picture pixel * scale + (x, y)
  const local = { opacity: 0.5, hover: true, forced: false, slow: 0, cursor: null, corner: null, drag: null, preview: null };
  let picture = null, masks = new Map(), layer = null, dead = false, space = false;
  let pending = new Map(), counter = 0, hovering = null, wanted = null, frame = 0, loads = 0;
  const mine = Math.random().toString(36).slice(2, 8); // two views of one widget tell their answers apart
  const scene = () => model.get("scene");

  // ---- elements
  const button = (text, title, onclick, extra = {}) =>
    make("button", { type: "button", textContent: text, title, "aria-label": title, onclick, ...extra });
  const models = make("select", { "aria-label": "Model", onchange: () => send("model", { name: models.value }) });
  const engines = make("select", { "aria-label": "Engine", title: "Engine",
    onchange: () => send("engine", { name: engines.value }) });
  const samples = make("select", { "aria-label": "Picture", onchange: () => send("sample", { name: samples.value }) });
  const file = make("input", { type: "file", accept: "image/*,.tif,.tiff", hidden: true,
    onchange: () => { if (file.files[0]) upload(file.files[0]); file.value = ""; } });
  const undo = button("Undo", "Undo (Z)", () => send("undo"));
  const redo = button("Redo", "Redo (Y)", () => send("redo"));
  const clear = button("Clear", "Remove all objects (C)", () => send("clear"));
  const next = button("Next object", "Next object (N)", () => send("next"), { className: "main" });
  const hover = make("input", { type: "checkbox", checked: true, onchange: () => setHover(hover.checked, true) });
  const feed = make("input", { type: "checkbox", onchange: () => send("feed back", { on: feed.checked }) });
  const bar = make("div", { className: "bar", role: "toolbar", "aria-label": "Segmentation" },
    models, samples, button("Open picture …", "Open your own picture", () => file.click()), file,
    make("span", { className: "gap" }), undo, redo, clear, next,
    button("?", "Help (?)", () => toggleHelp(), { className: "round" }));

  const canvas = make("canvas", { className: "view", role: "img" });
  const percent = make("span", {});
  const zoom = make("div", { className: "zoom" }, percent, button("−", "Zoom out (-)", () => zoomBy(1 / 1.4)),
    button("Fit", "Whole picture (R)", () => fit()), button("+", "Zoom in (+)", () => zoomBy(1.4)));
  const help = make("div", { className: "help", hidden: true, role: "dialog", "aria-label": "Help" },
    make("div", { className: "columns" }, ...Object.entries(HELP).map(([title, rows]) => make("section", {},
      make("h4", { textContent: title }), ...rows.map(([keys, what]) => make("div", { className: "line" },
        make("kbd", { textContent: keys }), make("span", { textContent: what })))))));
  const stage = make("div", { className: "stage" }, canvas, zoom, help);

  const encodeTime = make("b", { textContent: "–" }), decodeTime = make("b", { textContent: "–" });
  const three = make("div", { className: "three", role: "group", "aria-label": "Three masks" });
  const list = make("div", { className: "list", role: "list", "aria-label": "Objects" });
  const opacity = make("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Opacity of the masks",
    oninput: () => { local.opacity = opacity.value / 100; draw(true); } });
  const exports_ = ["PNG", "COCO", "NumPy"].map((text, i) => button(text,
    ["Label picture", "COCO JSON with run lengths", "NumPy archive"][i], () => send("export", { suffix: scene().exports[i] })));
  const part = (title, ...content) => make("section", {}, make("h4", { textContent: title }), ...content);
  const side = make("div", { className: "side" },
    make("div", { className: "times" },
      make("div", { className: "time" }, encodeTime, make("span", { textContent: "encoding, once" })),
      make("div", { className: "time" }, decodeTime, make("span", { textContent: "each click" }))),
    part("Three masks, predicted IoU", three),
    part("Objects", list),
    part("Options",
      make("label", { className: "tick" }, hover, "Preview under the pointer"), make("br"),
      make("label", { className: "tick" }, feed, "Feed the last mask back"),
      make("div", { className: "row" }, make("span", { className: "hint", textContent: "Opacity" }), opacity),
      make("div", { className: "row" }, make("span", { className: "hint", textContent: "Engine" }), engines)),
    part("Export masks", make("div", { className: "row" }, ...exports_)));

  const statusText = make("span", { className: "text", role: "status", "aria-live": "polite" });
  const at = make("span", { className: "at" });
  const status = make("div", { className: "status" }, statusText, at);
  const root = make("div", { className: "evsam", tabIndex: 0, "data-lm-suppress-shortcuts": "true",
    role: "application", "aria-label": "Segment a picture by clicks and boxes" },
    bar, make("div", { className: "body" }, stage, side), status);
  el.append(root);

  // ---- to the kernel
  function send(what, more = {}, buffers = []) {
    const id = `${mine}-${++counter}`;
    pending.set(id, Date.now());
    try {
      model.send({ do: what, id, ...more }, undefined, buffers);
    } catch {
      say("The kernel does not listen. Run the cell of this widget again.", true);
    }
    if (what !== "hover") { local.preview = null; root.classList.add("busy"); }
    return id;
  }

  async function upload(blob) {
    const bytes = await blob.arrayBuffer(), parts = Math.max(Math.ceil(bytes.byteLength / PART), 1);
    say(`Opening ${blob.name} …`);
    for (let i = 0; i < parts; i++)
      send("upload", { name: blob.name, part: i, parts }, [new DataView(bytes.slice(i * PART, (i + 1) * PART))]);
  }

  const watch = setInterval(() => {
    const oldest = Math.min(...pending.values());
    if (Date.now() - oldest > PATIENCE)
      say("Still waiting for the kernel. If it was restarted, run the cell of this widget again.", true);
  }, 1000);

  function answered(id) {
    pending.delete(id);
    if (![...pending.keys()].some((key) => key !== hovering)) root.classList.remove("busy");
  }

  function say(text, error = false) {
    statusText.textContent = text;
    status.classList.toggle("error", error);
  }

  // ---- preview under the pointer: one question at a time, always the latest place
  function ask(x, y) {
    wanted = local.hover && picture && inside(x, y) && !local.drag ? [Math.floor(x), Math.floor(y)] : null;
    if (!wanted) { if (local.preview) { local.preview = null; draw(); } return; }
    if (hovering && pending.has(hovering)) return;
    const [px, py] = wanted;
    wanted = null;
    hovering = send("hover", { x: px, y: py });
  }

  function setHover(on, byHand = false) {
    local.hover = hover.checked = on;
    local.forced = byHand && on;
    local.slow = 0;
    local.preview = null;
    draw();
  }

  async function onMessage(message, buffers) {
    if (message.kind === "hover") {
      if (hovering) { pending.delete(hovering); hovering = null; }
      local.slow = message.ms > SLOW ? local.slow + 1 : 0;
      if (local.slow > 2 && !local.forced) { // once may be a cold start
        setHover(false);
        return say(`The preview is off: ${milliseconds(message.ms)} are too slow to follow the pointer.`);
      }
      const image = await decoded(buffers[0]);
      if (!local.hover || [...pending.keys()].length) return;
      local.preview = { image, x: message.x, y: message.y, iou: message.iou };
      draw();
      if (wanted) ask(...wanted);
    } else if (message.kind === "file") {
      const suffix = message.name.slice(message.name.lastIndexOf("."));
      const url = URL.createObjectURL(new Blob([buffers[0]], { type: MIMES[suffix] }));
      make("a", { href: url, download: message.name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    }
  }

  // ---- view
  const [W, H] = [() => scene().size[0], () => scene().size[1]];
  const inside = (x, y) => x >= 0 && y >= 0 && x < W() && y < H();
  const ratio = () => window.devicePixelRatio || 1;
  const width = () => stage.clientWidth || 600;
  const tall = () => Math.round(Math.max(260, Math.min(580, W() ? (width() * H()) / W() : 320)));

  function fit() {
    view.scale = Math.min(width() / Math.max(W(), 1), tall() / Math.max(H(), 1));
    view.x = (width() - W() * view.scale) / 2;
    view.y = (tall() - H() * view.scale) / 2;
    view.fitted = true;
    draw(true);
  }

  function zoomBy(factor, x = width() / 2, y = tall() / 2) {
    const whole = Math.min(width() / W(), tall() / H());
    const scale = Math.max(whole * 0.8, Math.min(view.scale * factor, Math.max(40, whole * 4)));
    view.x = x - ((x - view.x) * scale) / view.scale;
    view.y = y - ((y - view.y) * scale) / view.scale;
    view.scale = scale;
    view.fitted = false;
    draw(true);
  }

  function resize() {
    const [w, h] = [width(), tall()];
    canvas.style.height = `${h}px`;
    canvas.width = Math.round(w * ratio());
    canvas.height = Math.round(h * ratio());
    view.fitted ? fit() : draw(true);
  }

  // ---- drawing
  function draw(anew = false) {
    if (anew) layer = null;
    if (!frame) frame = requestAnimationFrame(paint);
  }

  function paint() {
    frame = 0;
    const pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    percent.textContent = `${Math.round(view.scale * 100)} %`;
    if (!picture || dead) return;
    onPicture(pen);
    pen.imageSmoothingEnabled = view.scale < 3;
    pen.drawImage(picture, 0, 0, W(), H());
    pen.imageSmoothingEnabled = false;
    if (local.preview) {
      pen.globalAlpha = 0.35 + 0.3 * local.opacity;
      pen.drawImage(local.preview.image, 0, 0, W(), H());
      pen.globalAlpha = 1;
    }
    layer ??= masksLayer();
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(layer, 0, 0);
    pen.setTransform(ratio(), 0, 0, ratio(), 0, 0);
    for (const item of scene().items) prompts(pen, item);
    if (local.drag?.box) frameBox(pen, local.drag.box, colorOf(scene().current));
    if (local.corner) frameBox(pen, [...local.corner, local.cursor.x, local.cursor.y], colorOf(scene().current));
    if (local.cursor) cross(pen);
  }

  const colorOf = (number) => scene().items.find((item) => item.number === number)?.color ?? "#0072B2";
  const onPicture = (pen) => {
    const s = view.scale * ratio();
    pen.setTransform(s, 0, 0, s, view.x * ratio(), view.y * ratio());
  };
  const place = (x, y) => [x * view.scale + view.x, y * view.scale + view.y];

  /** All masks at the canvas' own pixels: fill, then an outline of constant width, white around color. */
  function masksLayer() {
    const all = new OffscreenCanvas(canvas.width, canvas.height), pen = all.getContext("2d");
    const one = new OffscreenCanvas(canvas.width, canvas.height), brush = one.getContext("2d");
    for (const item of [...scene().items].sort((a, b) => b.area - a.area)) {
      const mask = masks.get(String(item.number));
      if (!mask) continue;
      onPicture(pen);
      pen.imageSmoothingEnabled = brush.imageSmoothingEnabled = false;
      pen.globalAlpha = local.opacity;
      pen.drawImage(mask, 0, 0, W(), H());
      pen.globalAlpha = 1;
      pen.setTransform(1, 0, 0, 1, 0, 0);
      const wide = (item.number === scene().current ? 2 : 1.3) * ratio();
      for (const [radius, white] of [[wide + 1.2 * ratio(), true], [wide, false]]) {
        brush.setTransform(1, 0, 0, 1, 0, 0);
        brush.globalCompositeOperation = "source-over";
        brush.clearRect(0, 0, one.width, one.height);
        onPicture(brush);
        const step = radius / (view.scale * ratio());
        for (let k = 0; k < 8; k++)
          brush.drawImage(mask, step * Math.cos((k * Math.PI) / 4), step * Math.sin((k * Math.PI) / 4), W(), H());
        brush.globalCompositeOperation = "destination-out";
        brush.drawImage(mask, 0, 0, W(), H());
        if (white) {
          brush.setTransform(1, 0, 0, 1, 0, 0);
          brush.globalCompositeOperation = "source-in";
          brush.fillStyle = "#ffffffcc";
          brush.fillRect(0, 0, one.width, one.height);
        }
        pen.drawImage(one, 0, 0);
      }
    }
    return all;
  }

  function frameBox(pen, [x0, y0, x1, y1], color) {
    const [a, b] = place(x0, y0), [c, d] = place(x1, y1);
    for (const [style, wide, dash] of [["#ffffffcc", 4, []], [color, 2, [7, 4]]]) {
      pen.strokeStyle = style;
      pen.lineWidth = wide;
      pen.setLineDash(dash);
      pen.strokeRect(a, b, c - a, d - b);
    }
    pen.setLineDash([]);
  }

  function prompts(pen, item) {
    const current = item.number === scene().current;
    pen.globalAlpha = current ? 1 : 0.6;
    if (item.box) frameBox(pen, item.box, item.color);
    for (const [px, py, label] of item.points) {
      const [x, y] = place(px + 0.5, py + 0.5), r = current ? 8 : 6;
      pen.beginPath();
      label ? pen.arc(x, y, r, 0, 2 * Math.PI) : pen.rect(x - r + 1, y - r + 1, 2 * r - 2, 2 * r - 2);
      pen.fillStyle = label ? POSITIVE : NEGATIVE;
      pen.fill();
      pen.strokeStyle = "#fff";
      pen.lineWidth = 1.6;
      pen.stroke();
      pen.beginPath();
      pen.moveTo(x - r / 2, y);
      pen.lineTo(x + r / 2, y);
      if (label) { pen.moveTo(x, y - r / 2); pen.lineTo(x, y + r / 2); }
      pen.lineWidth = 2;
      pen.stroke();
    }
    pen.globalAlpha = 1;
    if (item.tag) tag(pen, item);
  }

  function tag(pen, item) {
    let [x, y] = place(...item.tag);
    y = Math.max(y - 12, 11);
    pen.font = "700 12px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillStyle = item.color;
    pen.strokeStyle = "#fff";
    pen.lineWidth = 1.4;
    pen.beginPath();
    pen.roundRect(x - 10, y - 9, 20, 18, 5);
    pen.fill();
    pen.stroke();
    pen.fillStyle = ink(item.color);
    pen.fillText(item.number, x, y + 0.5);
  }

  function cross(pen) {
    const [x, y] = place(local.cursor.x + 0.5, local.cursor.y + 0.5);
    for (const [style, wide] of [["#000", 4], ["#fff", 2]]) {
      pen.strokeStyle = style;
      pen.lineWidth = wide;
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        pen.moveTo(x + 4 * dx, y + 4 * dy);
        pen.lineTo(x + 13 * dx, y + 13 * dy);
      }
      pen.stroke();
    }
  }

  // ---- pointer
  const spot = (event) => {
    const edge = canvas.getBoundingClientRect();
    return [(event.clientX - edge.left - view.x) / view.scale, (event.clientY - edge.top - view.y) / view.scale];
  };

  canvas.onpointerdown = (event) => {
    event.preventDefault();
    root.focus({ preventScroll: true });
    local.cursor = local.corner = null;
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = spot(event), pan = event.button === 1 || space;
    local.drag = { x, y, cx: event.clientX, cy: event.clientY, vx: view.x, vy: view.y, pan, button: event.button };
  };

  canvas.onpointermove = (event) => {
    const [x, y] = spot(event), drag = local.drag;
    at.textContent = picture && inside(x, y) ? `x ${Math.floor(x)}  y ${Math.floor(y)}` : "";
    if (!drag) return ask(x, y);
    if (drag.pan) {
      [view.x, view.y, view.fitted] = [drag.vx + event.clientX - drag.cx, drag.vy + event.clientY - drag.cy, false];
      return draw(true);
    }
    const far = Math.hypot(event.clientX - drag.cx, event.clientY - drag.cy) > DRAG;
    if (drag.button === 0 && (far || drag.box)) {
      drag.box = [drag.x, drag.y, x, y];
      local.preview = null;
      draw();
    }
  };

  canvas.onpointerup = (event) => {
    const drag = local.drag;
    local.drag = null;
    if (!drag || drag.pan || !picture) return draw();
    if (drag.box) send("box", { box: drag.box.map((v) => Math.round(v)) });
    else send("point", { x: Math.floor(drag.x), y: Math.floor(drag.y), label: event.shiftKey || drag.button === 2 ? 0 : 1 });
    draw();
  };
  canvas.onpointercancel = () => { local.drag = null; draw(); };
  canvas.onpointerleave = () => { wanted = null; at.textContent = ""; if (local.preview) { local.preview = null; draw(); } };
  canvas.oncontextmenu = (event) => event.preventDefault();
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !root.contains(document.activeElement)) return; // the page scrolls on until one clicks here
    event.preventDefault();
    const edge = canvas.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.006 : 0.0015)), event.clientX - edge.left, event.clientY - edge.top);
  }, { passive: false });

  root.ondragover = (event) => { event.preventDefault(); root.classList.add("drop"); };
  root.ondragleave = () => root.classList.remove("drop");
  root.ondrop = (event) => {
    event.preventDefault();
    root.classList.remove("drop");
    if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
  };

  // ---- keys
  function toggleHelp(open = help.hidden) {
    help.hidden = !open;
  }

  function moveCursor(dx, dy, step) {
    local.cursor ??= { x: Math.floor(W() / 2), y: Math.floor(H() / 2) };
    local.cursor.x = Math.max(0, Math.min(W() - 1, local.cursor.x + dx * step));
    local.cursor.y = Math.max(0, Math.min(H() - 1, local.cursor.y + dy * step));
    at.textContent = `x ${local.cursor.x}  y ${local.cursor.y}`;
    draw();
  }

  function corner() {
    if (!local.cursor) return moveCursor(0, 0, 0);
    if (!local.corner) local.corner = [local.cursor.x, local.cursor.y];
    else {
      send("box", { box: [...local.corner, local.cursor.x, local.cursor.y] });
      local.corner = null;
    }
    draw();
  }

  const setOpacity = (by) => { opacity.value = Number(opacity.value) + by; opacity.oninput(); };
  const arrows = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] };
  const keys = {
    z: () => send("undo"), y: () => send("redo"), n: () => send("next"), c: () => send("clear"),
    delete: () => send("remove", { number: scene().current }), backspace: () => send("remove", { number: scene().current }),
    0: () => send("choose", { choice: null }), 1: () => send("choose", { choice: 0 }),
    2: () => send("choose", { choice: 1 }), 3: () => send("choose", { choice: 2 }),
    f: () => send("feed back", { on: !scene().feed_back }), h: () => setHover(!local.hover, true),
    "+": () => zoomBy(1.4), "=": () => zoomBy(1.4), "-": () => zoomBy(1 / 1.4), r: () => fit(),
    "[": () => setOpacity(-10), "]": () => setOpacity(10), "?": () => toggleHelp(), b: corner,
    escape: () => { toggleHelp(false); local.cursor = local.corner = local.drag = null; draw(); },
  };

  root.onkeydown = (event) => {
    event.stopPropagation();
    const key = event.key.toLowerCase(), field = ["SELECT", "INPUT"].includes(event.target.tagName);
    const onButton = event.target.tagName === "BUTTON" && (key === "enter" || key === " ");
    if (field || onButton) return;
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z" && key !== "y") return;
      event.preventDefault();
      return send(key === "y" || event.shiftKey ? "redo" : "undo");
    }
    if (key === " ") { space = true; canvas.classList.add("pan"); }
    else if (key in arrows) moveCursor(...arrows[key], event.shiftKey ? 1 : Math.max(1, Math.round(10 / view.scale)));
    else if (key === "enter" && local.cursor) send("point", { ...local.cursor, label: event.shiftKey ? 0 : 1 });
    else if (key in keys) keys[key]();
    else return;
    event.preventDefault();
  };
  const noPan = () => { space = false; canvas.classList.remove("pan"); };
  root.onkeyup = (event) => { if (event.key === " ") noPan(); };
  root.addEventListener("focusout", noPan); // the key may come up elsewhere

  // ---- from the kernel
  async function onPictureTrait() {
    const bytes = model.get("picture"), load = ++loads;
    const image = bytes?.byteLength ? await decoded(bytes) : null;
    if (load !== loads) return; // another one came meanwhile
    picture = image;
    local.preview = local.cursor = local.corner = null;
    view.fitted = true;
    resize();
    onScene(); // thumbnails
  }

  async function onMasks() {
    const files = model.get("masks");
    const loaded = await Promise.all(Object.entries(files).map(async ([key, bytes]) => [key, await decoded(bytes)]));
    if (files !== model.get("masks")) return;
    masks = new Map(loaded);
    draw(true);
  }

  function options(select, names, chosen) {
    if (names.join() !== [...select.options].map((option) => option.value).join())
      select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    select.value = chosen;
  }

  function onScene() {
    const now = scene();
    if (!now.models) return;
    options(models, now.models, now.model);
    options(engines, now.engines, now.engine);
    options(samples, now.samples.includes(now.name) ? now.samples : [now.name, ...now.samples], now.name);
    [undo.disabled, redo.disabled] = [!now.can.undo, !now.can.redo];
    clear.disabled = !now.items.some((item) => item.iou !== null);
    for (const one of exports_) one.disabled = !now.can.export;
    feed.checked = now.feed_back;
    encodeTime.textContent = milliseconds(now.encode_ms);
    decodeTime.textContent = milliseconds(now.decode_ms);
    canvas.setAttribute("aria-label", `${now.name}, ${now.size[0]} by ${now.size[1]} pixels, ${now.items.length} objects`);
    list.replaceChildren(...now.items.map(listed));
    if (now.candidates.length) three.replaceChildren(...now.candidates.map(candidate));
    else three.replaceChildren(make("span", { className: "hint", style: "grid-column: 1 / -1",
      textContent: "A click gives three masks: part, object, whole." }));
    draw(true);
  }

  function listed(item) {
    const count = item.points.length + (item.box ? 1 : 0);
    const detail = item.iou === null ? "click on it" : `${item.area.toLocaleString("en")} px · ${item.iou.toFixed(2)}`;
    const chip = make("span", { className: "chip", textContent: item.number, style: `background:${item.color};color:${ink(item.color)}` });
    const select = make("button", { type: "button", onclick: () => send("select", { number: item.number }),
      "aria-label": `Object ${item.number}, ${count} prompts, ${detail}` },
      chip, make("b", { textContent: `Object ${item.number}` }), make("span", { className: "grow", textContent: detail }));
    const remove = button("✕", `Remove object ${item.number}`, () => send("remove", { number: item.number }), { className: "x" });
    const current = String(item.number === scene().current);
    return make("div", { className: "item", role: "listitem", "aria-current": current }, select, remove);
  }

  function candidate({ iou, png, shown, window: [x0, y0, x1, y1] }, index) {
    const long = Math.max(W(), H()), small = make("canvas", {});
    [small.width, small.height] = [W(), H()].map((side) => Math.max(1, Math.round((160 * side) / long)));
    const pen = small.getContext("2d");
    decoded(png).then((mask) => {
      const [w, h] = [picture?.width ?? 0, picture?.height ?? 0];
      pen.globalAlpha = 0.7;
      if (picture) pen.drawImage(picture, x0 * w, y0 * h, (x1 - x0) * w, (y1 - y0) * h, 0, 0, small.width, small.height);
      pen.globalAlpha = 0.75;
      pen.drawImage(mask, 0, 0, small.width, small.height);
    });
    return make("button", { type: "button", title: `Mask ${index + 1} (${index + 1})`, "aria-pressed": String(shown),
      "aria-label": `Mask ${index + 1} of 3, predicted IoU ${iou.toFixed(2)}`,
      onclick: () => send("choose", { choice: index }) }, small, `${index + 1} · ${iou.toFixed(2)}`);
  }

  const onStatus = () => say(model.get("status").text, model.get("status").error);
  const onReply = () => answered(model.get("reply"));
  const listeners = { "change:picture": onPictureTrait, "change:masks": onMasks, "change:scene": onScene,
    "change:status": onStatus, "change:reply": onReply, "msg:custom": onMessage };
  for (const [name, listener] of Object.entries(listeners)) model.on(name, listener);
  const watcher = new ResizeObserver(resize);
  watcher.observe(stage);
  onScene();
  onPictureTrait();
  onMasks();
  onStatus();

  return () => { // the view goes, the model may live on
    dead = true;
    clearInterval(watch);
    watcher.disconnect();
    cancelAnimationFrame(frame);
    for (const [name, listener] of Object.entries(listeners)) model.off(name, listener);
  };
}

export default { render };
