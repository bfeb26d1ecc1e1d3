import { h } from "../parts/render.js";
export const open = () => ({ title: () => "webhooks", view: () => h("h1", null, "webhooks") });
export const webhookPanel = () => null;
