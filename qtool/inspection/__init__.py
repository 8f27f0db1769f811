"""What a checkpoint is: from its headers, against another checkpoint, or one tensor of it."""
