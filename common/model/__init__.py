"""A quantised Llama over packs of trees: loading, layout, attention, linears, memory."""
