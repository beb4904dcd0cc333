"""The live page: a text read token by token, and continued with latents steered.

Belongs here: what reads and steers for a person who is watching, and the page and the server that show it.
"""
