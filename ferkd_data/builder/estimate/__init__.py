"""What a build will take, measured before it is begun."""
