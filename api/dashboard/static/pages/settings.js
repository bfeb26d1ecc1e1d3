import { h } from "../parts/render.js";
export const open = () => ({ title: () => "settings", view: () => h("h1", null, "settings") });
export const webhookPanel = () => null;
