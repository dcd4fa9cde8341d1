//! The RoboCache daemon as a library, so that its tests and benches can drive it without a process of its own.

pub mod admin;
pub mod anchors;
pub mod assemble;
pub mod assemblers;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod exit;
pub mod future;
pub mod host;
pub mod inspect;
pub mod loader;
pub mod logging;
pub mod lookahead;
pub mod metrics;
pub mod open;
pub mod plan;
pub mod plan_anchors;
pub mod report;
pub mod sampler;
pub mod server;
pub mod session;
pub mod size;
pub mod store;
pub mod synth;
