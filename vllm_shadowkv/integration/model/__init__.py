"""What must be known of the model: how its keys were turned, and which layers it has beside ours."""
