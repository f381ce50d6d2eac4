import { app } from "../../../scripts/app.js"

// A new loader is wide enough for a whole file name. A node of a saved workflow gets its saved size afterwards.
const LOADER_WIDTH = 520

app.registerExtension({
  name: "dpdmd.loader_width",
  nodeCreated(node) {
    if (node.comfyClass === "DPDMDLoader") {
      node.setSize([Math.max(node.size[0], LOADER_WIDTH), node.size[1]])
    }
  },
})
