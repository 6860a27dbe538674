"""Images in: where they come from, the order in which training meets them, and the batches themselves."""
