"""A model's continuations of a prompt: sampled, embedded, attributed, clustered and tested by intervention."""
