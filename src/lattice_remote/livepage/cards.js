// Draws lattice's board card by card. The page replaces the whole board after each change, which blocks a browser for
// seconds if there are 10,000 cards. Here unchanged cards stay, and many new ones are added in pieces, as are the rows of
// the list.
//
// The page assigns the board's markup to #app. This setter recognizes it by its first element, keeps lattice's markup of
// each card, and leaves any other markup to the browser.
(function (remote) {
  "use strict";
  var BOARD = '<div class="board-wrapper">', FIRST = 60, PIECE_MS = 40, PIECE = 50;
  var TAG = /<div class="card(?: [^"]*)?" draggable="true" data-task-id="([^"]*)"|<(\/?)div\b/g;
  var HEAT = /height:[\d.]+%|" title="Last status change">[^<]*/g, AGE = /" title="Last status change">([^<]*)/;
  var own = Object.getOwnPropertyDescriptor(Element.prototype, "innerHTML");
  var columns = null, drawing = 0;

  Object.defineProperty(Element.prototype, "innerHTML", {
    configurable: true,
    enumerable: own.enumerable,
    get: own.get,
    set: function (html) {
      if (this.id === "list-table") { list(this, String(html)); return; }
      if (this.id !== "app") { own.set.call(this, html); return; }
      measure();
      drawing += 1;
      remote.tell("drawn");
      var found = String(html).startsWith(BOARD) && parse(String(html));
      if (found) draw(this, found);
      else { columns = null; own.set.call(this, html); }
    }
  });

  // The list: its first rows at once, the others in pieces.
  var ROW = "<tr class=", ROWS = 100, MOST_ROWS = 1000, PIECE_ROWS = 400, listing = 0;
  var height = 0, seen = 0;  // of the list before it is drawn again: its height, and the rows up to those in view

  function measure() {
    var old = document.getElementById("list-table"), rows = old ? old.querySelectorAll("tbody tr").length : 0;
    height = old ? old.offsetHeight : 0;
    seen = height ? Math.ceil(rows * (window.scrollY + window.innerHeight) / height) : 0;
  }
  function list(place, html) {
    var rows = html.split(ROW), id = ++listing, last = rows.length > 1 ? rows[rows.length - 1] : "";
    var cut = last.lastIndexOf("</tr>") + "</tr>".length;
    var next = Math.min(Math.max(ROWS, seen), MOST_ROWS);
    if (rows.length <= next || cut < "</tr>".length) { own.set.call(place, html); return; }
    rows[rows.length - 1] = last.slice(0, cut);
    own.set.call(place, rows.slice(0, next).join(ROW) + last.slice(cut));
    place.style.minHeight = height + "px";  // the window keeps its position
    height = seen = 0;
    var body = place.querySelector("tbody");
    function more() {
      if (id !== listing || !body.isConnected) return;
      body.insertAdjacentHTML("beforeend", ROW + rows.slice(next, next += PIECE_ROWS).join(ROW));
      if (next < rows.length) window.setTimeout(more, 0);
      else place.style.minHeight = "";
    }
    window.setTimeout(more, 0);
  }

  // Separate the board's markup into its columns, without cards, and the content of each column's body: cards and others.
  function parse(html) {
    var rest = "", bodies = [], depth = 0, from = 0, start = 0, cardDepth = 0, bodyDepth = 0, key = "", tag;
    TAG.lastIndex = 0;
    while ((tag = TAG.exec(html))) {
      if (tag[2]) {  // a closing tag
        var end = TAG.lastIndex + 1;
        if (cardDepth && depth === cardDepth) {
          add(bodies, key, html.slice(start, end));
          from = end;
          cardDepth = 0;
        } else if (bodyDepth && depth === bodyDepth) {
          add(bodies, "", html.slice(from, tag.index));
          from = tag.index;
          bodyDepth = 0;
        }
        depth -= 1;
        continue;
      }
      depth += 1;
      if (tag[1] !== undefined && !cardDepth) {
        if (!bodyDepth) return null;
        add(bodies, "", html.slice(from, tag.index));
        start = tag.index;
        key = tag[1];
        cardDepth = depth;
      } else if (!bodyDepth && html.startsWith(' class="board-col-body">', TAG.lastIndex)) {
        var opened = html.indexOf(">", TAG.lastIndex) + 1;
        rest += html.slice(from, opened);
        from = opened;
        bodies.push([]);
        bodyDepth = depth;
      }
    }
    return depth ? null : { rest: rest + html.slice(from), bodies: bodies };
  }
  function add(bodies, key, html) {
    if (html) bodies[bodies.length - 1].push({ key: key || html, html: html });
  }

  function draw(app, board) {
    var frame = document.createElement("template");
    own.set.call(frame, board.rest);
    var fresh = Array.from(frame.content.querySelectorAll(".board-col"));
    if (fresh.length !== board.bodies.length) { columns = null; own.set.call(app, board.rest); return; }
    if (!columns || !columns.length || !columns[0].isConnected || !isSame(columns, fresh)) {
      app.replaceChildren(frame.content);
      columns = fresh;
    } else {
      columns.forEach(function (column, index) { update(column, fresh[index]); });
    }
    app.querySelectorAll = withoutCards;
    fill(columns, board.bodies, drawing, FIRST);
  }
  function isSame(old, fresh) {
    return old.length === fresh.length && old.every(function (column, index) {
      return column.dataset.status === fresh[index].dataset.status && column.children.length === 2;
    });
  }
  function update(column, fresh) {
    Array.from(fresh.attributes).forEach(function (attribute) {
      if (column.getAttribute(attribute.name) !== attribute.value) column.setAttribute(attribute.name, attribute.value);
    });
    if (column.firstElementChild.outerHTML !== fresh.firstElementChild.outerHTML) {
      column.firstElementChild.replaceWith(fresh.firstElementChild);
    }
  }

  // After drawing, the page adds a listener to each card, so kept cards would have several. It gets this card instead,
  // which stands for the one that is clicked.
  var any = { addEventListener: function (name, listener) { opened = name === "click" ? listener : opened; } }, opened = null;
  function withoutCards(selector) {
    return selector === ".card" && columns ? [any] : Element.prototype.querySelectorAll.call(this, selector);
  }
  document.addEventListener("click", function (event) {
    var card = columns && event.target.closest && event.target.closest("#app .board .card");
    if (!card || !card.remoteKey || !opened) return;
    any.dataset = card.dataset;
    any.classList = card.classList;
    opened.call(card, event);
  });
  // The page ignores the click that would end a drag. Browsers send none, so it would ignore the next.
  document.addEventListener("pointerdown", function (event) {
    var card = event.target.closest && event.target.closest(".card.was-dragged");
    if (card) card.classList.remove("was-dragged");
  }, true);
  // Rows of the list call this function, which lattice 0.2 does not define for them.
  window.openDetailPanel = function (task) { location.hash = "#/task/" + task; };

  // Add at most so many elements to each column, then go on in pieces until all are there or the board is drawn again.
  function fill(places, bodies, id, most) {
    var end = performance.now() + PIECE_MS;
    var isDone = places.map(function (column, index) {
      return performance.now() < end || most === FIRST ? reconcile(column.lastElementChild, bodies[index], most) : false;
    }).every(Boolean);
    if (isDone) return;
    window.setTimeout(function () {
      if (id === drawing && places[0].isConnected) fill(places, bodies, id, PIECE);
    }, 0);
  }
  function reconcile(body, wanted, most) {
    var known = body.remoteItems || new Map(), left = most, at = body.firstChild, missing = [], isDone = true;
    var keys = new Set(wanted.map(function (item) { return item.key; }));
    wanted.forEach(function (item) {
      while (at && !(at.remoteKey && keys.has(at.remoteKey))) at = removed(at, known);
      var element = known.get(item.key);
      if (element && element.remoteHtml !== item.html && !cooled(element, item.html)) {
        if (left > 0) {
          var made = make(item);
          left -= 1;
          if (element === at) at = made;
          element.remoteNext = made;
          element.replaceWith(made);
          known.set(item.key, element = made);
        } else isDone = false;  // it stays as it was for a moment
      }
      if (!element) {
        if (left <= 0) { isDone = false; return; }
        left -= 1;
        missing.push({ item: item, before: at });
        return;
      }
      if (element === at) at = at.nextSibling;
      else body.insertBefore(element, at);
    });
    while (at) at = removed(at, known);
    insert(body, missing, known);
    body.remoteItems = known;
    return isDone;
  }
  function removed(element, known) {
    var next = element.nextSibling;
    if (known.get(element.remoteKey) === element) known.delete(element.remoteKey);
    element.remove();
    return next;
  }
  function make(item) {
    var holder = document.createElement("template");
    own.set.call(holder, item.html);
    return marked(holder.content.firstElementChild, item);
  }
  function marked(element, item) {
    element.remoteKey = item.key;
    element.remoteHtml = item.html;
    return element;
  }
  // New elements with the same successor are inserted together.
  function insert(body, missing, known) {
    for (var first = 0; first < missing.length;) {
      var before = missing[first].before, group = [];
      while (first < missing.length && missing[first].before === before) group.push(missing[first++].item);
      var holder = document.createElement("template");
      own.set.call(holder, group.map(function (item) { return item.html; }).join(""));
      Array.from(holder.content.children).forEach(function (element, index) {
        known.set(group[index].key, marked(element, group[index]));
      });
      while (before && before.parentNode !== body) before = before.remoteNext || null;  // replaced since
      body.insertBefore(holder.content, before);
    }
  }
  // Only the time since the last change of status differs: the page adjusts the bar itself.
  function cooled(element, html) {
    if (element.remoteHtml.replace(HEAT, "") !== html.replace(HEAT, "")) return false;
    var now = AGE.exec(html), was = AGE.exec(element.remoteHtml);
    if (now && was && now[1] !== was[1]) {
      var age = element.querySelector('[title="Last status change"]');
      if (age) age.textContent = now[1];
    }
    element.remoteHtml = html;
    return true;
  }
})(window.latticeRemote);
