// Three things Gradio does not do by itself: a button that explains a control, panels and tab that stay as they were over a
// reload, and the link from a disabled button to its reason.
(() => {
  const KEY = "lowvram-tuner";
  const kept = () => { try { return JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { return {}; } };
  const keep = (change) => sessionStorage.setItem(KEY, JSON.stringify({ ...kept(), ...change }));
  let number = 0;

  // The help text of a control is folded behind a small button next to its label.
  function explain(block) {
    const text = block.querySelector(".info-text");
    const label = block.querySelector("[data-testid='block-info']");
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
      if (radio && !radio.disabled) {
        radio.disabled = true;
        radio.closest("label").title = "Not available in this version";
      }
    }
  }

  function settle() {
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
