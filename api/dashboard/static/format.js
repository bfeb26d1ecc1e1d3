// Numbers, durations and times as the dashboard writes them, in every browser alike (en-GB).

const whole = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const clockSeconds = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const weekday = new Intl.DateTimeFormat("en-GB", { weekday: "short" });
const full = new Intl.DateTimeFormat("en-GB", { dateStyle: "full", timeStyle: "long" });

/** 375882 → 375,882; from a million on 1.25M. */
export function count(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) < 1e6 ? whole.format(value) : short(value);
}

/** Every digit. */
export const exact = (value) => whole.format(value);

/** Three figures: 41.2k, 1.25M, 256M. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size < 1000) return size >= 100 || Number.isInteger(value) ? whole.format(value) : value.toFixed(1);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    // 999,950 is 1.00M and not 1,000k.
    if (size >= unit * 0.9995) {
      const scaled = value / unit;
      return `${scaled.toFixed(Math.abs(scaled) >= 99.95 ? 0 : Math.abs(scaled) >= 9.995 ? 1 : 2)}${name}`;
    }
  }
  return whole.format(value);
}

/** Rounded down to one decimal: 100 only where nothing is missing, "< 0.1" where it is more than nothing. */
export function percentNumber(part, total) {
  if (!total) return "0";
  if (part >= total) return "100";
  const tenths = Math.floor((part * 1000) / total);
  return tenths === 0 ? (part > 0 ? "< 0.1" : "0") : (tenths / 10).toFixed(1);
}

export const percent = (part, total) => `${percentNumber(part, total)} %`;

/** A share between 0 and 1. */
export function share(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 0.0001) return "< 0.01 %";
  return `${value >= 0.1 ? Math.floor(value * 100) : Number((value * 100).toFixed(value >= 0.01 ? 1 : 2))} %`;
}

/** Seconds in at most two units: 0.9 s, 51 s, 10 min 14 s, 5 h 2 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0) return "0 s";
  if (seconds < 0.095) return seconds === 0 ? "0 s" : seconds < 0.0095 ? "< 0.01 s" : `${seconds.toFixed(2)} s`;
  if (seconds < 9.95) return `${seconds.toFixed(1).replace(/\.0$/, "")} s`;
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return units(Math.floor(s / 60), "min", s % 60, "s");
  const minutes = Math.floor(s / 60);
  if (minutes < 1440) return units(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.floor(minutes / 60);
  return units(Math.floor(hours / 24), "d", hours % 24, "h");
}

function units(large, largeName, little, littleName) {
  return little ? `${large} ${largeName} ${little} ${littleName}` : `${large} ${largeName}`;
}

/** For narrow cells: minutes without their seconds. */
export function brief(seconds) {
  return seconds >= 60 && seconds < 3600 ? `${Math.floor(seconds / 60)} min` : duration(Math.round(seconds));
}

/** Unix seconds as 14:32 today, Tue 14:32 within six days, else 2026-11-03 14:32. */
export function time(at, { seconds = false, now = Date.now() } = {}) {
  if (at === null || at === undefined) return "–";
  const date = new Date(at * 1000);
  const hours = (seconds ? clockSeconds : clock).format(date);
  const today = new Date(now);
  if (date.toDateString() === today.toDateString()) return hours;
  const away = Math.abs(date - today) / 86400000;
  if (away < 6) return `${weekday.format(date)} ${hours}`;
  const pad = (value) => String(value).padStart(2, "0");
  return `${date.getFullYear()}-${pad(date.getMonth() + 1)}-${pad(date.getDate())} ${hours}`;
}

export const fullTime = (at) => full.format(new Date(at * 1000));

/** Things a second: 612/s, 3.9/s, 14/min below one. */
export function rate(value) {
  if (value === null || value === undefined) return ["–", ""];
  if (value >= 99.5) return [short(Math.round(value)), "/s"];
  if (value >= 1) return [value.toFixed(1), "/s"];
  return value === 0 ? ["0", "/s"] : [String(Math.max(1, Math.round(value * 60))), "/min"];
}

export const rateText = (value) => rate(value).join("");

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  return value < 1e6 ? `${Math.max(value ? 0.1 : 0, value / 1e6).toFixed(1)} MB` : `${short(value / 1e6)} MB`;
}

/** job_019f2c0a… → …8f3c */
export const tail = (id) => `…${String(id).slice(-4)}`;

export function shortId(id) {
  return id.length > 20 ? `${id.slice(0, 10)}…${id.slice(-4)}` : id;
}

/** "1 line", "2 lines". */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Control characters as their pictures: an answer may hold any byte, and none may vanish or act. */
export function visible(value) {
  return String(value).replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (character) => {
    const code = character.charCodeAt(0);
    return code === 13 ? "" : String.fromCharCode(code === 127 ? 0x2421 : 0x2400 + code);
  });
}
