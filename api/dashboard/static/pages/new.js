import { h } from "../parts/render.js";
export const open = () => ({ title: () => "new", view: () => h("h1", null, "new") });
export const webhookPanel = () => null;
