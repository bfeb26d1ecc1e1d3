import { h } from "../parts/render.js";
export const open = () => ({ title: () => "worker", view: () => h("h1", null, "worker") });
export const webhookPanel = () => null;
