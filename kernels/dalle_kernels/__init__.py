"""DALL-E's attention masks and the attention that uses them; imports nothing of dalle_dist."""
