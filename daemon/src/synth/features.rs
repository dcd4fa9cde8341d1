//! The features of a synthetic LeRobot dataset: their order, types, names and signals.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde_json::{Map, Value, json};

use super::signal::Signals;
use super::{SynthArgs, SynthLayout};

/// A vector of floats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vector {
    pub(crate) name: &'static str,
    pub(crate) dim: u32,
    /// Seconds by which it runs ahead of the state: an action asks for where the robot will be.
    pub(crate) lead_s: f64,
    prefix: &'static str,
    noise: f64,
    /// The stream whose signal it follows.
    signal: &'static str,
}

/// The columns every LeRobot dataset ends with.
pub(crate) const INDEX_COLUMNS: [(&str, &str); 5] = [
    ("timestamp", "float32"),
    ("frame_index", "int64"),
    ("episode_index", "int64"),
    ("index", "int64"),
    ("task_index", "int64"),
];

pub(crate) const TASKS: [&str; 3] =
    ["Pick up the red cube.", "Put the cube into the bin.", "Open the top drawer."];

/// The vectors that `args` ask for.
pub(crate) fn vectors(args: &SynthArgs) -> Vec<Vector> {
    let vector =
        |name, dim, lead_s, prefix, noise, signal| Vector { name, dim, lead_s, prefix, noise, signal };
    let mut vectors = vec![
        vector("observation.state", args.state_dim, 0.0, "joint", 0.002, "state"),
        vector("action", args.action_dim, 0.1, "joint", 0.0, "state"),
    ];
    if args.tactile_dim > 0 {
        vectors.push(vector("observation.tactile", args.tactile_dim, 0.0, "taxel", 0.02, "tactile"));
    }
    vectors
}

impl Vector {
    pub(crate) fn signals(&self, seed: u64, episode: u64) -> Signals {
        Signals::new(seed, self.signal, episode, self.dim, self.noise)
    }
}

/// The Arrow schema of the data files.
pub(crate) fn schema(args: &SynthArgs) -> SchemaRef {
    let vectors = vectors(args).into_iter().map(|vector| {
        let data_type = if vector.dim == 1 { DataType::Float32 } else { args.list.data_type(vector.dim) };
        Field::new(vector.name, data_type, true)
    });
    let index = INDEX_COLUMNS.into_iter().map(|(name, dtype)| {
        let data_type = if dtype == "float32" { DataType::Float32 } else { DataType::Int64 };
        Field::new(name, data_type, true)
    });
    Arc::new(Schema::new(vectors.chain(index).collect::<Vec<_>>()))
}

/// `features` of `info.json`.
pub(crate) fn info(args: &SynthArgs) -> Value {
    let mut features = Map::new();
    for Vector { name, dim, prefix, .. } in vectors(args) {
        let names: Vec<String> = (0..dim).map(|i| format!("{prefix}_{i}")).collect();
        features.insert(name.to_owned(), json!({ "dtype": "float32", "shape": [dim], "names": names }));
    }
    for (name, dtype) in INDEX_COLUMNS {
        features.insert(name.to_owned(), json!({ "dtype": dtype, "shape": [1], "names": null }));
    }
    Value::Object(features)
}

/// What Hugging Face `datasets` leaves in the footer of a data file about its columns.
pub(crate) fn hugging_face(args: &SynthArgs) -> String {
    let kind = if args.layout == SynthLayout::LerobotV21 { "Sequence" } else { "List" };
    let mut features = Map::new();
    for Vector { name, dim, .. } in vectors(args) {
        let value = json!({ "dtype": "float32", "_type": "Value" });
        let feature =
            if dim == 1 { value } else { json!({ "feature": value, "length": dim, "_type": kind }) };
        features.insert(name.to_owned(), feature);
    }
    for (name, dtype) in INDEX_COLUMNS {
        features.insert(name.to_owned(), json!({ "dtype": dtype, "_type": "Value" }));
    }
    json!({ "info": { "features": features } }).to_string()
}
