"""The block graph: nodes, what they promise each other, and how they are opened."""
