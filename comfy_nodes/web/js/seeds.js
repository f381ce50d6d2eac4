// Seeds at a Glance: the drafts as buttons below the node. A click sets `pick` and runs the workflow again.

import { app } from "../../../scripts/app.js";

const NODE = "DPDMDSeeds";
const HEIGHT = 500; // of the drafts in a new node, in pixels of the canvas: four rows of square pictures
const WIDTH = 460; // of a new node: four columns with room for their labels

function address({ filename, subfolder, type }) {
    const query = new URLSearchParams({ filename, subfolder, type });
    return `/view?${query}`;
}

function button(node, tile) {
    const element = document.createElement("button");
    element.dataset.pick = tile.pick;
    element.title = `Finish ${tile.label}`;
    element.style.cssText = "padding:0;border:2px solid transparent;background:none;color:inherit;cursor:pointer;min-width:0";
    const image = document.createElement("img");
    image.src = address(tile);
    image.alt = tile.label;
    image.style.cssText = "width:100%;display:block";
    const label = document.createElement("span");
    label.textContent = tile.label;
    // a long seed is cut; the title has all of it
    label.style.cssText = "display:block;font:11px sans-serif;white-space:nowrap;overflow:hidden;text-overflow:ellipsis";
    element.append(image, label);
    element.addEventListener("click", () => {
        pickWidget(node).value = tile.pick;
        mark(node);
        app.queuePrompt(0);
    });
    return element;
}

function pickWidget(node) {
    return node.widgets.find((widget) => widget.name === "pick");
}

function mark(node) {
    for (const element of node.drafts.children) {
        const chosen = Number(element.dataset.pick) === pickWidget(node).value;
        element.style.borderColor = chosen ? "#4a9" : "transparent";
    }
}

function show(node, tiles, columns) {
    node.drafts.style.gridTemplateColumns = `repeat(${columns || Math.ceil(Math.sqrt(tiles.length))}, 1fr)`;
    node.drafts.replaceChildren(...tiles.map((tile) => button(node, tile)));
    mark(node);
}

app.registerExtension({
    name: "dpdmd.seeds",
    async beforeRegisterNodeDef(nodeType, nodeData) {
        if (nodeData.name !== NODE) return;
        const { onNodeCreated, onExecuted } = nodeType.prototype;
        nodeType.prototype.onNodeCreated = function () {
            onNodeCreated?.apply(this, arguments);
            this.drafts = document.createElement("div");
            this.drafts.style.cssText = "display:grid;gap:4px;overflow:auto;align-content:start";
            this.addDOMWidget("drafts", "drafts", this.drafts, { serialize: false, getMinHeight: () => HEIGHT });
            this.setSize([Math.max(this.size[0], WIDTH), this.size[1]]);
        };
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments);
            if (output.dpdmd_seeds) show(this, output.dpdmd_seeds, output.dpdmd_columns[0]);
        };
    },
});
