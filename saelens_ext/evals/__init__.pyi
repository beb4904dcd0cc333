"""The public names and where they are defined."""

from .baselines import gaussian_directions as gaussian_directions
from .baselines import kmeans_directions as kmeans_directions
from .baselines import matched_controls as matched_controls
from .baselines import principal_directions as principal_directions
from .baselines import random_activations as random_activations
from .baselines import single_neurons as single_neurons
from .baselines import trained_sae as trained_sae
from .baselines import untrained_twin as untrained_twin
from .concepts_data import Concept as Concept
from .concepts_data import packaged_concepts as packaged_concepts
from .concepts_data import read_concepts as read_concepts
from .detection import DetectionEvidence as DetectionEvidence
from .detection import evaluate_detection as evaluate_detection
from .evidence import Evidence as Evidence
from .methods import Method as Method
from .novelty import evaluate_novelty as evaluate_novelty
from .probing import ProbeEvidence as ProbeEvidence
from .probing import evaluate_probes as evaluate_probes
from .synthetic import evaluate_on_synthetic as evaluate_on_synthetic
