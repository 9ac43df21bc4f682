// A click on a map enlarges it; arrow keys go to the next one. Without it the page shows the same.
(() => {
  const maps = [...document.querySelectorAll(".map")];
  const dialog = document.getElementById("zoom");
  const image = document.getElementById("zoom-image");
  const label = document.getElementById("zoom-label");
  let at = 0, scale = 1;

  const show = (index) => {
    at = (index + maps.length) % maps.length;
    image.src = maps[at].querySelector("img").src;
    image.alt = maps[at].dataset.label;
    label.textContent = maps[at].dataset.label;
  };

  const enlarge = (factor) => {
    scale = Math.min(8, Math.max(1, scale * factor));
    image.style.width = `${100 * scale}%`;
  };

  maps.forEach((map, index) => map.addEventListener("click", () => {
    show(index);
    enlarge(1 / scale);
    dialog.showModal();
  }));
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => show(at + Number(button.dataset.step)));
  }
  for (const button of dialog.querySelectorAll("[data-scale]")) {
    button.addEventListener("click", () => enlarge(Number(button.dataset.scale)));
  }
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(at - 1);
    if (event.key === "ArrowRight") show(at + 1);
  });
})();
