"""What is found of what is wrong with photographs."""
