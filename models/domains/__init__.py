"""Models for several domains, tasks and kinds of content: what a request is made in, and what an item is made of."""
