"""Time to quality: who trains how, what they have learned by when, and how good that is."""
