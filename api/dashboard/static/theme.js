// Runs before the first paint, so that a dark page never flashes light. A classic script: modules come after parsing.
{
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem("pagemill") || "{}");
  } catch {
    stored = {};
  }
  const root = document.documentElement;
  if (stored.theme === "light" || stored.theme === "dark") root.dataset.theme = stored.theme;
  if (stored.density === "compact") root.dataset.density = "compact";
  if (new URLSearchParams(location.search).get("wall") === "1") root.dataset.wall = "1";
}
