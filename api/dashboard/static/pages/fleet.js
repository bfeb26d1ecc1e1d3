import { h } from "../parts/render.js";
export const open = () => ({ title: () => "fleet", view: () => h("h1", null, "fleet") });
export const webhookPanel = () => null;
