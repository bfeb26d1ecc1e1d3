import { h } from "../parts/render.js";
export const open = () => ({ title: () => "queue", view: () => h("h1", null, "queue") });
export const webhookPanel = () => null;
