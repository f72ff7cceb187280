// What Gradio does not do by itself: a button that explains a control, panels and tab that stay as they were over a reload,
// a file dropped on the form, and the link from a disabled button to its reason.
(() => {
  const KEY = "lowvram-tuner";
  const kept = () => { try { return JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { return {}; } };
  const keep = (change) => sessionStorage.setItem(KEY, JSON.stringify({ ...kept(), ...change }));
  let number = 0;

  // The help text of a control is folded behind a small button next to its label.
  function explain(block) {
    const text = block.querySelector(".info-text");
    const label = block.querySelector("[data-testid='block-info'], .label-text");
    if (!text || !label || block.querySelector("button.why")) return;
    text.id = text.id || `why-${++number}`;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "why";
    button.textContent = "i";
    button.setAttribute("aria-label", `What does “${label.textContent.trim()}” do?`);
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", text.id);
    button.addEventListener("click", (event) => {
      event.preventDefault();
      event.stopPropagation();
      button.setAttribute("aria-expanded", String(block.classList.toggle("show-why")));
    });
    label.after(button);
  }

  // Bit widths without a quantizer are shown but cannot be chosen; the server names them in the control's classes.
  function withoutBits() {
    const group = document.querySelector("#bits");
    for (const name of group?.classList ?? []) {
      const radio = name.startsWith("without-") && group.querySelector(`input[value="${name.slice(8)}"]`);
      if (radio && !radio.closest("label").title) {
        radio.disabled = true;
        radio.closest("label").classList.add("off");
        radio.closest("label").title = "Not available in this version";
      }
    }
  }

  // Open panels, the tab and the scrolled place are remembered for this browser tab and put back once after a reload.
  const header = (id) => document.querySelector(`#${CSS.escape(id)} button.label-wrap`);
  const isOpen = (button) => button.classList.contains("open");
  const before = kept();
  const pending = new Set(before.open || []);

  document.addEventListener("click", (event) => {
    const tab = event.target.closest("[role='tab']");
    if (tab) keep({ tab: tab.id || tab.textContent.trim() });
    const panel = event.target.closest("button.label-wrap");
    const id = panel?.closest(".block[id]")?.id;
    if (!id) return;
    pending.delete(id);
    setTimeout(() => {
      const open = new Set(kept().open || []);
      if (isOpen(panel)) open.add(id); else open.delete(id);
      keep({ open: [...open] });
    }, 100);
  });
  window.addEventListener("beforeunload", () => keep({ scroll: window.scrollY }));

  function putBack() {
    if (before.tab) {
      const tabs = [...document.querySelectorAll("[role='tab']")];
      const tab = tabs.find((t) => t.id === before.tab || t.textContent.trim() === before.tab);
      if (tab) {
        delete before.tab;
        if (tab.getAttribute("aria-selected") !== "true") tab.click();
      }
    }
    for (const id of [...pending]) {
      const button = header(id);
      if (!button) continue;
      pending.delete(id);
      if (!isOpen(button)) button.click();
    }
    if (before.scroll && document.documentElement.scrollHeight - innerHeight >= before.scroll) {
      window.scrollTo(0, before.scroll);
      delete before.scroll;
    }
  }

  // A file dropped anywhere on the form goes the way of the upload button.
  const over = (event) => event.target.closest?.("#what") && [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => { if (over(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = document.querySelector("#data-row input[type='file']");
    if (!over(event) || !input) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  function settle() {
    putBack();
    withoutBits();
    document.querySelectorAll(".block").forEach(explain);
    document.querySelector("button#start")?.setAttribute("aria-describedby", "reason-text");
  }

  function begin() {
    const observer = new MutationObserver(() => { clearTimeout(observer.timer); observer.timer = setTimeout(settle, 60); });
    observer.observe(document.body, { childList: true, subtree: true });
    settle();
  }

  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();
