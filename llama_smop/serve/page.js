// A time plays its stretch of the clip; the crop follows the clip. All listeners hear events on their way down: media
// events do not come up, and gradio stops clicks that do.
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-seek]");
  const clip = button && button.closest(".result").querySelector(".clip");
  if (!clip) return;
  clip.currentTime = Number(button.dataset.seek);
  clip.dataset.until = button.dataset.until;
  play(clip);
}, true);
const follow = (event) => {
  const clip = event.target;
  if (!clip.classList || !clip.classList.contains("clip")) return;
  const crop = clip.closest(".result").querySelector(".crop");
  if (event.type === "timeupdate" && clip.dataset.until && clip.currentTime >= Number(clip.dataset.until)) {
    delete clip.dataset.until;
    clip.pause();
  }
  if (!crop) return;
  if (Math.abs(crop.currentTime - clip.currentTime) > 0.12) crop.currentTime = clip.currentTime;
  if (event.type === "play") play(crop);
  if (event.type === "pause" || event.type === "ended") crop.pause();
};
for (const kind of ["play", "pause", "ended", "seeked", "timeupdate"]) document.addEventListener(kind, follow, true);

// Play it. A pause that follows at once ends the promise with an error, which is none.
function play(media) {
  media.play().catch((error) => { if (error.name !== "AbortError") throw error; });
}
