// Editor for a task's plan and notes in the page. Lattice's own page would start an editor on the server's machine.
//
// A save includes the text that was edited, so the server merges changes of other lines and reports changes of the same
// lines. Unsaved text survives a reload, until it is saved or discarded.
(function (remote) {
  "use strict";
  var WORDS = { plans: "Plan", notes: "Notes" };
  var SAVED = "Saved.", MERGED = "Saved and merged with another user’s changes.";
  var OPEN = /^\/api\/tasks\/([^/?]+)\/open-(plans|notes)\/?(?:\?|$)/;

  remote.instead.push(function (path, method) {
    var asked = OPEN.exec(path);
    if (method !== "POST" || !asked) return null;
    open(asked[1], asked[2]);
    return Promise.resolve(new Response('{"ok": true, "data": {}}', { headers: { "Content-Type": "application/json" } }));
  });

  // --- text ---

  // As a text field holds it. The merge keeps the server's line ends, because it sees them as unchanged.
  function normal(text) { return text === null ? null : text.replace(/\r\n?/g, "\n"); }

  function Text(task, kind) {
    this.url = "/remote/" + kind + "/" + task;
    this.key = "lattice draft " + remote.url(this.url);
    this.base = null;      // the text that was edited; null: there was none
    this.text = "";        // the field's content
    this.theirs = undefined;  // the server's text in a conflict
    this.replaced = null;     // the user's text before the server's was taken
    this.isLoaded = false;
    this.locked = "";      // why it is not editable
    this.said = "";
    this.isBad = false;
    this.isSaving = false;
  }
  Text.prototype.isDirty = function () { return this.text !== (this.base || "") || this.theirs !== undefined; };
  Text.prototype.say = function (said, isBad) { this.said = said; this.isBad = Boolean(isBad); };

  Text.prototype.keep = function () {
    if (!this.isLoaded) return;
    try {
      if (!this.isDirty() && this.replaced === null) sessionStorage.removeItem(this.key);
      else sessionStorage.setItem(this.key, JSON.stringify({ base: this.base, text: this.text, replaced: this.replaced }));
    } catch (error) { /* no room: it is here as long as the page is */ }
  };
  Text.prototype.kept = function () {
    try { return JSON.parse(sessionStorage.getItem(this.key)); } catch (error) { return null; }
  };

  Text.prototype.load = async function () {
    var now = await ask(this.url);
    var text = normal(now.text), kept = this.kept();
    this.isLoaded = true;
    this.locked = now.editable ? "" : now.reason;
    this.base = text;
    this.text = text || "";
    this.say("");
    if (kept) {
      this.base = kept.base;
      this.text = kept.text;
      this.replaced = kept.replaced;
      if (this.isDirty()) this.say("This is your unsaved text.");
    }
  };

  Text.prototype.type = function (text) {
    this.text = text;
    if (this.said === SAVED || this.said === MERGED) this.say("");
    this.keep();
  };

  // Show a change by another user, or announce it if the user has typed.
  Text.prototype.look = async function () {
    if (!this.isLoaded) return this.load();
    if (this.isSaving || this.theirs !== undefined) return;
    var wasDirty = this.isDirty(), base = this.base, now = await ask(this.url), text = normal(now.text);
    if (this.isSaving || this.base !== base || this.isDirty() !== wasDirty) return;
    this.locked = now.editable ? "" : now.reason;
    if (text === base) return;
    if (wasDirty) {
      this.say("Another user has changed this text. Saving merges both versions.");
      return;
    }
    this.base = text;
    this.text = text || "";
    this.say("Just changed by another user.");
  };

  Text.prototype.save = async function () {
    var sent = this.text;
    this.isSaving = true;
    this.say("Saving …");
    try {
      this.settle(sent, await ask(this.url, { text: sent, base: this.base }));
    } catch (error) {
      this.say(error.message + " Your text is still here.", true);
    } finally {
      this.isSaving = false;
      this.keep();
    }
  };
  Text.prototype.settle = function (sent, saved) {
    var now = normal(saved.now.text);
    this.locked = saved.now.editable ? "" : saved.now.reason;
    if (saved.outcome === "conflict") {
      this.theirs = now;
      this.say(this.locked ? "This cannot be saved: " + this.locked + ". Copy your text if you need it."
                           : "Another user has changed the same lines.", true);
      return;
    }
    this.theirs = undefined;
    this.replaced = null;
    if (this.text === sent) this.base = this.text = now || "";
    else this.base = sent;  // the user typed during the save: the next save merges
    this.say(saved.outcome === "merged" && now !== sent ? MERGED : SAVED);
  };
  Text.prototype.putOver = function () {
    this.base = this.theirs;
    this.theirs = undefined;
    return this.save();
  };
  Text.prototype.takeTheirs = function () {
    this.replaced = this.text;
    this.base = this.theirs;
    this.text = this.theirs || "";
    this.theirs = undefined;
    this.say("This is the text on the server.");
    this.keep();
  };
  Text.prototype.takeBack = function () {
    this.text = this.replaced;
    this.replaced = null;
    this.say("");
    this.keep();
  };
  // Put an earlier version into the field; saving makes it the newest.
  Text.prototype.takeVersion = async function (version) {
    var found = await ask(this.url + "/versions/" + version.change);
    if (this.replaced === null && this.text !== (this.base || "")) this.replaced = this.text;
    this.text = normal(found.text) || "";
    this.say("The text of " + when(version) + " by " + version.actor + ". Save to restore it.");
    this.keep();
  };
  Text.prototype.forget = function () {
    this.text = this.base || "";
    this.theirs = undefined;
    this.replaced = null;
    this.keep();
  };

  async function ask(url, body) {
    var answer, envelope = null;
    try {
      answer = await window.fetch(url, body && {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body)
      });
    } catch (error) {
      throw new Error("The server cannot be reached.");
    }
    try { envelope = await answer.json(); } catch (error) { /* said below */ }
    if (envelope && envelope.ok) return envelope.data;
    if (answer.status === 401) throw new Error("You are signed out. Sign in in another tab, then try again.");
    throw new Error("Server error: " + ((envelope && envelope.error && envelope.error.message) || answer.status) + ".");
  }

  function when(version) { return new Date(version.time).toLocaleString(); }

  // --- dialog ---

  var dialog = null, parts = {}, texts = {}, kind = "plans";

  function make(tag, name, content) {
    var part = document.createElement(tag);
    if (name) { parts[name] = part; part.className = "remote-" + name; }
    if (content) part.append.apply(part, [].concat(content));
    return part;
  }
  function button(name, label, does) {
    var made = make("button", name, label);
    made.type = "button";
    made.className += " btn";
    made.addEventListener("click", does);
    return made;
  }
  function build() {
    var heading = make("h2", "heading");
    heading.id = "remote-editor-heading";
    var tabs = make("div", "tabs", Object.keys(WORDS).map(function (each) {
      return button("tab-" + each, WORDS[each], function () { show(each); });
    }));
    var field = make("textarea", "field");
    field.setAttribute("aria-describedby", "remote-editor-said");
    field.addEventListener("input", function () { current().type(field.value); draw(); });
    var said = make("p", "said");
    said.id = "remote-editor-said";
    said.setAttribute("role", "status");
    var theirs = make("pre", "theirs");
    theirs.tabIndex = 0;
    var conflict = make("section", "conflict", [
      make("h3", "", "On the server"), theirs,
      make("div", "choices", [
        button("over", "Overwrite with mine", function () { act(current().putOver()); }),
        button("take", "Use the server’s", function () { current().takeTheirs(); fill(); })
      ]),
      make("h3", "", "Yours: combine both here, or choose one")
    ]);
    var versions = make("div", "versions");
    versions.setAttribute("role", "listbox");
    versions.setAttribute("aria-label", "Versions");
    dialog = make("dialog", "", [
      make("header", "", [heading, tabs, button("history", "History", showHistory), button("close", "Close", close)]),
      versions, conflict, field,
      make("footer", "", [said, button("back", "Restore my text", function () { current().takeBack(); fill(); }),
                          button("save", "Save", save)])
    ]);
    parts.save.classList.add("btn-primary");
    parts.save.title = "Ctrl+S";
    dialog.id = "remote-editor";
    dialog.setAttribute("aria-labelledby", heading.id);
    dialog.addEventListener("keydown", press);
    dialog.addEventListener("cancel", function (event) { event.preventDefault(); close(); });
    dialog.addEventListener("close", function () { if (isDirty()) dialog.showModal(); });  // the browser closed it anyway
    document.body.appendChild(dialog);
  }
  function press(event) {
    event.stopPropagation();  // the page has its own shortcuts
    if ((event.ctrlKey || event.metaKey) && (event.key === "s" || event.key === "Enter")) {
      event.preventDefault();
      save();
    } else if (event.key === "Escape") {
      event.preventDefault();
      close();
    }
  }

  // --- earlier versions ---

  async function showHistory() {
    if (!parts.versions.hidden) { hideHistory(); return; }
    var text = current();
    parts.versions.replaceChildren("Loading …");
    parts.versions.hidden = false;
    parts.history.setAttribute("aria-expanded", "true");
    try {
      var found = await ask(text.url + "/versions");
      if (text === current()) listVersions(text, found);
    } catch (error) {
      hideHistory();
      text.say(error.message, true);
      draw();
    }
  }
  function listVersions(text, found) {
    var kept = found.filter(function (version) { return version.bytes !== null; });
    parts.versions.replaceChildren.apply(parts.versions, kept.map(function (version) {
      var choice = button("", when(version) + "  " + version.actor + "  " + version.bytes + " bytes", function () {
        act(text.takeVersion(version).catch(function (error) { text.say(error.message, true); }));
      });
      choice.setAttribute("role", "option");
      choice.title = version.command;
      return choice;
    }));
    if (!kept.length) parts.versions.append("No versions available.");
  }
  function hideHistory() {
    parts.versions.hidden = true;
    parts.history.setAttribute("aria-expanded", "false");
  }

  function current() { return texts[kind]; }
  function isEditable(text) { return text.isLoaded && !text.locked; }
  function isDirty() { return Object.values(texts).some(function (text) { return text.isDirty(); }); }

  function open(task, which) {
    if (!dialog) build();
    texts = { plans: new Text(task, "plans"), notes: new Text(task, "notes") };
    parts.heading.textContent = task;
    if (!dialog.open) dialog.showModal();
    show(which);
    load(texts.plans);
    load(texts.notes);
    ask("/api/tasks/" + task).then(function (found) {
      parts.heading.textContent = (found.short_id || task) + " " + (found.title || "");
    }, function () { /* its id stays */ });
  }
  async function load(text) {
    try { await text.load(); } catch (error) { text.say(error.message, true); }
    if (text !== current()) { draw(); return; }
    fill();
    focus();
  }
  function focus() {
    if (isEditable(current()) && window.matchMedia("(pointer: fine)").matches) parts.field.focus();  // no on-screen keyboard
  }
  function show(which) { kind = which; hideHistory(); fill(); focus(); }
  function save() {
    var text = current();
    if (isEditable(text) && !text.isSaving && text.theirs === undefined && text.isDirty()) act(text.save());
  }
  async function act(saving) {
    draw();
    await saving;
    fill();
  }
  function close() {
    if (isDirty() && !window.confirm("Discard your unsaved changes?")) return;
    Object.values(texts).forEach(function (text) { text.forget(); });
    texts = {};
    dialog.close();
  }

  // Put the text into the field, keeping cursor and scroll position.
  function fill() {
    var text = current(), field = parts.field;
    if (!text) return;
    if (field.value !== text.text) {
      var top = field.scrollTop, at = field.selectionStart;
      field.value = text.text;
      field.setSelectionRange(Math.min(at, text.text.length), Math.min(at, text.text.length));
      field.scrollTop = top;
    }
    draw();
  }
  function draw() {
    var text = current(), hasConflict = text.theirs !== undefined;
    Object.keys(WORDS).forEach(function (each) {
      var tab = parts["tab-" + each];
      tab.setAttribute("aria-pressed", String(each === kind));
      tab.textContent = WORDS[each] + (texts[each].isDirty() ? " •" : "");
    });
    parts.field.readOnly = !isEditable(text);
    parts.field.setAttribute("aria-label", WORDS[kind]);
    parts.field.placeholder = isEditable(text) ? "Empty." : "";
    parts.conflict.hidden = !hasConflict;
    if (hasConflict) compare(text);
    parts.history.disabled = text.isSaving || hasConflict || !isEditable(text);
    parts.over.disabled = text.isSaving || !isEditable(text);
    parts.take.disabled = text.isSaving;
    parts.back.hidden = text.replaced === null;
    parts.save.hidden = hasConflict;
    parts.save.disabled = text.isSaving || !isEditable(text) || !text.isDirty();
    parts.said.classList.toggle("remote-bad", text.isBad);
    var said = status(text);
    if (parts.said.textContent !== said) parts.said.textContent = said;
  }

  function status(text) {
    if (text.isBad) return text.said;
    if (text.locked) return "Read-only: " + text.locked + "." + (text.isDirty() ? " Copy what you have typed if you need it." : "");
    return text.said || (!text.isLoaded ? "Loading …" : text.isDirty() ? "Unsaved changes." : "");
  }

  // Show the server's text, marking lines that the user's lacks; scroll to the first when the text is new.
  var compared = null;
  function compare(text) {
    var theirs = text.theirs === null ? "(the file was removed)" : text.theirs, known = JSON.stringify([text.text, theirs]);
    if (known === compared) return;
    var isNew = parts.theirs.textContent !== theirs, mine = new Set(text.text.split("\n"));
    parts.theirs.replaceChildren.apply(parts.theirs, theirs.split(/(?<=\n)/).map(function (line) {
      if (mine.has(line.replace("\n", ""))) return document.createTextNode(line);
      var mark = document.createElement("mark");
      mark.textContent = line;
      return mark;
    }));
    compared = known;
    var first = parts.theirs.querySelector("mark");
    if (isNew && first) first.scrollIntoView({ block: "center" });
  }

  // --- page events ---

  var isLooking = false;
  remote.on("change", async function () {
    if (isLooking || !dialog || !dialog.open) return;
    isLooking = true;
    var looked = Object.values(texts).map(function (text) { return text.look().catch(function () {}); });
    await Promise.all(looked);
    isLooking = false;
    fill();
  });
  window.addEventListener("beforeunload", function (event) { if (isDirty()) event.preventDefault(); });
})(window.latticeRemote);
