import { h } from "../parts/render.js";
export const open = () => ({ title: () => "line", view: () => h("h1", null, "line") });
export const webhookPanel = () => null;
