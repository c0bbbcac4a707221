document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.classList.contains("dark") ||
    (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
  root.className = dark ? "light" : "dark";
});
