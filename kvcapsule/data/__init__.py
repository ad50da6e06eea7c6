"""Questions about images, with their answers: where they come from, and how they become a model's inputs."""
