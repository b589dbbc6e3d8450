"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const names = ["low", "mid", "top"];
  const MOVED_SHOWN = 12;
  const titles = data.buckets.map((name) => name.replace("_", " "));
  let thresholds = data.stored.values.slice();
  let which = data.stored.confidence;

  const ROWS = ["below", "known", "right"];
  const counted = (row, threshold) => {
    // Thresholds between two steps come from quantiles alone: a build's, or suggested ones.
    const exact = data.exact[which].find((one) => one[0] === threshold);
    if (exact) return exact[1 + ROWS.indexOf(row)];
    const at = Math.round(threshold * data.steps);
    return data.confidence[which][row][Math.min(data.steps, Math.max(0, at))];
  };
  const edgesOf = (row, total) => [0, ...thresholds.map((t) => counted(row, t)), total];
  const differences = (row, total) => {
    const edges = edgesOf(row, total);
    return data.buckets.map((_, i) => edges[i + 1] - edges[i]);
  };
  const bucketOf = (value, given) => given.filter((t) => value >= t).length;
  // In full where it lies between two steps: rounded, it would give other buckets.
  const number = (value) => {
    const rounded = Number(value.toFixed(3));
    return String(Math.abs(rounded - value) < 1e-9 * value ? rounded : value);
  };

  function drawHistogram() {
    const below = data.confidence[which].below, total = data.totals[which][0];
    const counts = [];
    for (let i = 0; i < data.bins; i += 1) {
      const at = (edge) => (edge === data.bins ? total : below[(edge * data.steps) / data.bins]);
      counts.push(at(i + 1) - at(i));
    }
    const largest = Math.max(1, ...counts);
    byId("y-top").textContent = `${((100 * largest) / Math.max(1, total)).toFixed(1)} %`;
    const svg = byId("histogram"), space = svg.namespaceURI;
    svg.querySelectorAll("rect").forEach((bar, i) => {
      const height = (100 * counts[i]) / largest;
      bar.setAttribute("y", 100 - height);
      bar.setAttribute("height", height);
      bar.setAttribute("class", "b" + bucketOf((i + 0.5) / data.bins, thresholds));
    });
    svg.querySelectorAll("line").forEach((line) => line.remove());
    for (const threshold of thresholds) {
      const line = document.createElementNS(space, "line");
      for (const [key, value] of [["x1", 100 * threshold], ["x2", 100 * threshold], ["y1", 0], ["y2", 100]]) {
        line.setAttribute(key, value);
      }
      svg.append(line);
    }
  }

  function fillTable() {
    const [all, known, right] = ROWS.map((row, i) => differences(row, data.totals[which][i]));
    const total = Math.max(1, data.totals[which][0]);
    const said = [];
    byId("buckets").querySelectorAll("tbody tr").forEach((row, i) => {
      const share = ((100 * all[i]) / total).toFixed(2);
      const hits = known[i] ? ((100 * right[i]) / known[i]).toFixed(1) : "–";
      const cells = row.querySelectorAll("td");
      cells[0].textContent = all[i].toLocaleString("en");
      cells[1].textContent = share;
      cells[2].textContent = hits;
      said.push(`${titles[i]} ${share} %`);
    });
    byId("live").textContent = said.join(", ");
  }

  function fillLines() {
    const [low, mid, top] = thresholds.map(number);
    const kind = which === "max" ? "" : ', confidence="target"';
    byId("line").textContent = `fd.Calibration(thresholds=fd.Thresholds(low=${low}, mid=${mid}, top=${top}${kind}))`;
    const option = which === "max" ? "" : " --confidence target";
    byId("option").textContent = `--thresholds ${low} ${mid} ${top}${option}`;
    const total = Math.max(1, data.totals[which][0]);
    const shares = thresholds.map((t) => String(Number((counted("below", t) / total).toFixed(4))));
    byId("quantiles").textContent = `--thresholds quantile:${shares.join(",")}${option}`;
  }

  const element = (name, text, kind) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  function movedCard(crop, before, after) {
    const card = element("li", "", "card");
    if (crop.picture) {
      const picture = new Image(112, 112);
      picture.alt = `crop ${crop.crop} of ${crop.key}`;
      picture.src = crop.picture;
      card.append(picture);
    }
    const move = element("p", "");
    move.append(element("span", "", "chip b" + before), `${titles[before]} → `, element("span", "", "chip b" + after), titles[after]);
    const named = element("p", "", "truth");
    named.append(`${crop[which].toFixed(2)} `, element("bdi", crop.named), crop.truth === "unlabelled" ? "" : crop.right ? " ✓" : " ✗");
    const where = element("p", "", "where");
    where.append(element("bdi", crop.key), `, crop ${crop.crop}`);
    card.append(move, named, where);
    return card;
  }

  function fillMoved() {
    const stored = data.stored;
    const moved = [];
    for (const crop of data.crops) {
      const before = bucketOf(crop[stored.confidence], stored.values), after = bucketOf(crop[which], thresholds);
      if (before !== after) moved.push([crop, before, after]);
    }
    // Where many move, they are shown from all over the range.
    const step = Math.max(1, moved.length / MOVED_SHOWN);
    const shown = moved.filter((_, i) => Math.floor(i / step) !== Math.floor((i - 1) / step)).slice(0, MOVED_SHOWN);
    byId("changes").hidden = which === stored.confidence && thresholds.every((value, i) => value === stored.values[i]);
    byId("moved").replaceChildren(...shown.map((move) => movedCard(...move)));
    byId("moves").textContent = moved.length
      ? `${moved.length} of ${data.crops.length} sampled crops are in another bucket than in the label set.`
      : "None of the sampled crops is in another bucket than in the label set.";
  }

  function show() {
    names.forEach((name, i) => {
      byId(name).value = thresholds[i];
      byId(name).setAttribute("aria-valuetext", number(thresholds[i]));
      if (document.activeElement !== byId(name + "-number")) byId(name + "-number").value = number(thresholds[i]);
    });
    byId("which").value = which;
    byId("kind").textContent = which === "max" ? "p_max" : "the ground truth's probability";
    drawHistogram();
    fillTable();
    fillLines();
    fillMoved();
  }

  function moveTo(i, value) {
    if (!Number.isFinite(value)) return;
    thresholds[i] = Math.round(Math.min(1, Math.max(0, value)) * data.steps) / data.steps;
    // Thresholds stay in their order: the others are pushed along.
    for (let j = i - 1; j >= 0; j -= 1) thresholds[j] = Math.min(thresholds[j], thresholds[j + 1]);
    for (let j = i + 1; j < 3; j += 1) thresholds[j] = Math.max(thresholds[j], thresholds[j - 1]);
    show();
  }

  names.forEach((name, i) => {
    for (const id of [name, name + "-number"]) {
      byId(id).addEventListener("input", (event) => moveTo(i, event.target.valueAsNumber));
    }
    byId(name + "-number").addEventListener("change", () => show());
  });
  byId("which").addEventListener("change", (event) => { which = event.target.value; show(); });
  for (const start of ["stored", "suggested", "defaults"]) {
    byId("use-" + start).addEventListener("click", () => {
      thresholds = data[start].values.slice();
      which = data[start].confidence;
      show();
    });
  }

  document.querySelectorAll("[data-copy]").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = byId(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        // A page from disk may have no clipboard: the text is marked, to be copied by hand.
        getSelection().selectAllChildren(code);
        button.textContent = "Marked";
      }
    });
  });

  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const falls = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const numeric = head.classList.contains("num");
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        numeric ? value(a) - value(b) : value(a).localeCompare(value(b), "en"));
      table.tBodies[0].append(...(falls ? rows.reverse() : rows));
    }));
  });

  show();
})();
