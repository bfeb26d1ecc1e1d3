import { h } from "../parts/render.js";
export const open = () => ({ title: () => "access", view: () => h("h1", null, "access") });
export const webhookPanel = () => null;
