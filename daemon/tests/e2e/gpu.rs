//! Rings on a GPU: the same batches as on a CPU, from every tier, whatever dies, and no slot written under its reader.
//!
//! On a simulated device, which runs late and catches what a GPU would not forgive; with `ROBOCACHE_TEST_DEVICE=cuda:0`
//! on a real one, where slerp may differ by one unit in the last place (its sine is the GPU's own).

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use half::{bf16, f16};
use robocache::{
    Anchors, Batch, ColumnRole, ConnectError, DType, Interp, LoaderBuilder, LoaderError, Window,
};

use crate::support::{Daemon, data};
use crate::trainer::bytes;

mod deaths;

/// The device under test.
fn device() -> String {
    std::env::var("ROBOCACHE_TEST_DEVICE").unwrap_or_else(|_| "sim:0".to_owned())
}

fn is_simulated() -> bool {
    device().starts_with("sim")
}

/// What makes a daemon have the device.
fn simulate() -> &'static [&'static str] {
    if is_simulated() { &["--simulate-gpus", "2"] } else { &[] }
}

/// A daemon with a device.
fn serve(arguments: &[&str]) -> Daemon {
    Daemon::start(&[simulate(), arguments].concat())
}

/// The whole of a batch: ids, and each column's name, dtype, role and bytes.
type Whole = (Vec<u64>, Vec<(String, DType, ColumnRole, Vec<u8>)>);

fn whole(batch: &Batch) -> Whole {
    let columns = batch.columns().iter();
    let column = |c: &robocache::ColumnInfo| (c.name.clone(), c.dtype, c.role, bytes(batch, &c.name));
    (batch.ids(), columns.map(column).collect())
}

/// Distance in units of the last place, for finite floats of one sign or near zero.
fn ulps(dtype: DType, a: &[u8], b: &[u8]) -> i64 {
    let ordered = |bits: i64, sign: u32| if bits >> sign & 1 == 1 { -(bits & !(1 << sign)) } else { bits };
    match dtype {
        DType::Float32 => {
            let bits = |x: &[u8]| i64::from(f32::from_le_bytes(x.try_into().unwrap()).to_bits());
            (ordered(bits(a), 31) - ordered(bits(b), 31)).abs()
        }
        DType::BFloat16 => {
            let bits = |x: &[u8]| i64::from(bf16::from_le_bytes(x.try_into().unwrap()).to_bits());
            (ordered(bits(a), 15) - ordered(bits(b), 15)).abs()
        }
        DType::Float16 => {
            let bits = |x: &[u8]| i64::from(f16::from_le_bytes(x.try_into().unwrap()).to_bits());
            (ordered(bits(a), 15) - ordered(bits(b), 15)).abs()
        }
        other => panic!("{other} is compared bit for bit"),
    }
}

/// Compares batches of both kinds until one epoch of each is over. `slerp` names the columns that may be 1 ulp apart.
fn equal(on_cpu: &LoaderBuilder, on_gpu: &LoaderBuilder, slerp: &[&str]) -> u64 {
    let (cpu, mut gpu) = (on_cpu.connect().unwrap(), on_gpu.connect().unwrap());
    let mut batches = 0;
    for wanted in cpu {
        let (wanted, found) =
            (whole(&wanted.unwrap()), whole(&gpu.next_batch().unwrap().expect("as many batches")));
        assert_eq!(found.0, wanted.0, "ids of batch {batches}");
        assert_eq!(found.1.len(), wanted.1.len());
        for ((name, dtype, role, found), (wanted_name, _, _, wanted)) in found.1.iter().zip(&wanted.1) {
            assert_eq!((name, found.len()), (wanted_name, wanted.len()));
            if found != wanted {
                let close = slerp.contains(&name.as_str()) && !is_simulated() && *role == ColumnRole::Data;
                let size = dtype.size_bytes();
                let apart =
                    found.chunks(size).zip(wanted.chunks(size)).map(|(a, b)| ulps(*dtype, a, b)).max();
                assert!(close && apart <= Some(1), "{name} of batch {batches} differs: {apart:?} ulps");
            }
        }
        batches += 1;
    }
    assert!(gpu.next_batch().unwrap().is_none(), "more batches than on the CPU");
    batches
}

/// Every dataset there is, in many shapes: name, loader, columns made by slerp.
fn recordings(daemon: &Daemon) -> Vec<(&'static str, LoaderBuilder, &'static [&'static str])> {
    let streams = |files: &[(&str, &str, &str, &str)]| {
        let mut manifest = "layout = \"streams\"\n".to_owned();
        for (name, file, time, columns) in files {
            manifest.push_str(&format!(
                "[streams.{name}]\nfile = \"{file}\"\ntime = {time}\ncolumns = {columns}\n"
            ));
        }
        manifest
    };
    let g1 = |name: &str, dtype| {
        let deltas = [-0.1, 0.0, 1.0 / 30.0, 0.5];
        let loader = daemon.loader(data(name)).dtype(dtype).shuffle(true).seed(3).batch_size(250);
        loader.delta_timestamps("action", deltas).delta_timestamps("observation.state", [0.0])
    };
    let seconds = "{ column = \"t\", unit = \"s\" }";
    let comma = streams(&[
        ("acceleration", "parquet/imu_accelerometer.parquet", seconds, "[\"value\"]"),
        ("wheels", "parquet/can_wheel_speed.parquet", seconds, "[\"value\"]"),
        ("steering", "parquet/can_steering_angle.parquet", seconds, "[\"value\"]"),
        ("position", "parquet/camera_frame_pose.parquet", seconds, "[\"frame_positions\"]"),
        ("orientation", "parquet/camera_frame_pose.parquet", seconds, "[\"frame_orientations\"]"),
        ("bus", "parquet/can_raw_can.parquet", seconds, "[\"address\", \"src\"]"),
    ]);
    let grid = || Window::new(50.0, 20).start(-0.2);
    let comma = daemon
        .loader(data("comma2k19_seg"))
        .manifest(comma)
        .anchors(Anchors::Every(50.0))
        .window("acceleration", grid())
        .window("wheels", grid().interp(Interp::Linear).max_gap(0.05))
        .window("steering", grid().interp(Interp::Previous))
        .window("position", grid().interp(Interp::Nearest))
        .window("orientation", grid().interp(Interp::Slerp))
        .window("bus", Window::at([-0.001, 0.0, 0.013]))
        .dtype(DType::BFloat16);
    let ns = "{ column = \"header.stamp_ns\", unit = \"ns\" }";
    let husky = |extension: &str| {
        let manifest = streams(&[
            (
                "imu",
                &format!("data/imu_data.{extension}"),
                ns,
                "[\"angular_velocity.x\", \"angular_velocity.y\", \"angular_velocity.z\"]",
            ),
            (
                "odometry",
                &format!("data/husky_velocity_controller_odom.{extension}"),
                ns,
                "[\"pose.pose.position.x\", \"pose.pose.position.y\", \"twist.twist.linear.x\"]",
            ),
            ("gps", &format!("data/fix.{extension}"), ns, "[\"latitude\", \"longitude\", \"altitude\"]"),
        ]);
        let window = || Window::new(20.0, 8).start(-0.35);
        daemon
            .loader(data("husky_outdoor"))
            .manifest(manifest)
            .anchors(Anchors::Every(20.0))
            .window("imu", window())
            .window("odometry", window().interp(Interp::Nearest))
            .window("gps", window().max_gap(0.3))
            .dtype(DType::Float64)
            .dtype_of("imu", DType::Float16)
            .shuffle(true)
            .batch_size(200)
    };
    let us = "{ column = \"timestamp\", unit = \"us\" }";
    let px4 = streams(&[
        ("attitude", "parquet/vehicle_attitude_0.parquet", us, "[\"q[0]\", \"q[1]\", \"q[2]\", \"q[3]\"]"),
        ("rates", "parquet/vehicle_attitude_0.parquet", us, "[\"rollspeed\", \"pitchspeed\", \"yawspeed\"]"),
    ]);
    let px4 = daemon
        .loader(data("px4_auavx21"))
        .manifest(px4)
        .anchors(Anchors::Every(20.0))
        .window("attitude", Window::new(100.0, 10).interp(Interp::Slerp))
        .window("rates", Window::new(100.0, 10));
    let octo = "layout = \"frames\"\n[frames]\nfiles = \"parquet/*.parquet\"\nepisode = \"episode_index\"\ntime = { rate = 5.0 }\n";
    let octo = daemon.loader(data("octo_bridge")).manifest(octo).shuffle(true).batch_size(7);
    vec![
        ("g1_v21", g1("g1_v21", DType::Float32), &[]),
        ("g1_v30_conv", g1("g1_v30_conv", DType::BFloat16), &[]),
        ("g1_v30_conv, every feature", daemon.loader(data("g1_v30_conv")).batch_size(999), &[]),
        ("comma2k19_seg", comma, &["orientation"]),
        ("husky_outdoor, Parquet", husky("parquet"), &[]),
        ("husky_outdoor, Arrow", husky("arrow"), &[]),
        ("px4_auavx21", px4, &["attitude"]),
        ("octo_bridge", octo, &[]),
    ]
}

#[test]
fn every_recording_gives_the_same_batches_on_a_gpu_as_on_a_cpu() {
    let daemon = serve(&[]);
    for (name, builder, slerp) in recordings(&daemon) {
        let batches = equal(&builder, &builder.clone().device(device()), slerp);
        assert!(batches > 1, "{name}: {batches} batches");
    }
    let status = daemon.status();
    let gpu = &status["gpus"][0];
    assert!(gpu["gpu_cache"]["hits"].as_u64() > Some(0), "{gpu}");
    assert_eq!(
        (&gpu["pinned_cache"]["hits"], &gpu["passing"]),
        (&0.into(), &0.into()),
        "all of it fits: {gpu}"
    );
}

#[test]
fn the_tier_an_episode_is_read_from_changes_nothing() {
    for (cache, pinned, tiers) in [
        ("300KiB", "300KiB", ["/gpu_cache/hits", "/pinned_cache/hits", "/passing"].as_slice()),
        ("0", "1GiB", &["/pinned_cache/hits"]),
        ("0", "0", &["/passing"]),
    ] {
        let daemon = serve(&["--gpu-cache", cache, "--pinned-cache", pinned]);
        for (name, builder, slerp) in recordings(&daemon) {
            if matches!(name, "g1_v21" | "comma2k19_seg" | "octo_bridge") {
                equal(&builder.clone().seed(5), &builder.seed(5).device(device()), slerp);
            }
        }
        let status = daemon.status();
        let gpu = &status["gpus"][0];
        for tier in ["/gpu_cache/hits", "/pinned_cache/hits", "/passing"] {
            let used = gpu.pointer(tier).and_then(serde_json::Value::as_u64) > Some(0);
            assert_eq!(used, tiers.contains(&tier), "{tier} with {cache} and {pinned}: {gpu}");
        }
    }
}

#[test]
fn windows_too_large_for_one_burst_are_copied_in_parts_and_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let dataset = directory.path().join("wide");
    let synth = ["--episodes", "4", "--frames", "600", "--action-dim", "4096", "--state-dim", "1", "--json"];
    let made = Command::new(env!("CARGO_BIN_EXE_robocached")).arg("synth").arg(&dataset).args(synth).output();
    assert!(made.unwrap().status.success());
    for (pinned, tier) in [("1GiB", "/pinned_cache/hits"), ("0", "/passing")] {
        let daemon = serve(&["--gpu-cache", "0", "--pinned-cache", pinned]);
        // From each anchor to the end of its episode: up to 9.8 MB.
        let window = Window::at([0.0, 0.37, 19.9]).interp(Interp::Linear);
        let loader = daemon.loader(&dataset).window("action", window);
        let loader = loader.anchors(Anchors::Every(1.0)).shuffle(true).batch_size(1);
        assert_eq!(equal(&loader, &loader.clone().device(device()), &[]), 80);
        let status = daemon.status();
        let number = |key: &str| status["gpus"][0].pointer(key).and_then(serde_json::Value::as_u64).unwrap();
        assert!(number(tier) >= 80);
        let (uploaded, bursts) = (number("/uploaded_bytes"), number("/bursts"));
        assert!(uploaded > 300 << 20, "{uploaded} bytes");
        let at_once = (number("/memory/total") / 64).clamp(64 << 20, 1 << 30) / 2;
        assert!(uploaded / bursts <= at_once, "{uploaded} bytes in {bursts} bursts");
        // One stream of copies and one of launches: neither can have worked for longer than all bursts took together.
        let seconds = |key: &str| status["gpus"][0][key].as_f64().unwrap();
        let bursts = seconds("burst_s");
        for key in ["upload_s", "kernel_s"] {
            assert!(seconds(key) > 0.0 && seconds(key) <= bursts, "{key}: {} of {bursts} s", seconds(key));
        }
    }
}

#[test]
fn a_dataset_without_a_loader_makes_room_for_the_next_one() {
    let daemon = serve(&["--gpu-cache", "6MiB", "--pinned-cache", "0"]);
    for (before, name) in ["g1_v30_conv", "g1_v21", "g1_v30_conv"].into_iter().enumerate() {
        let builder = daemon.loader(data(name)).features(["action"]).device(device()).batch_size(512);
        assert_eq!(builder.connect().unwrap().map(Result::unwrap).count(), 71);
        daemon.wait_until("the loader is gone", || daemon.log().matches("detached").count() == before + 1);
    }
    assert_eq!(daemon.status()["gpus"][0]["passing"], 0);
}

#[test]
fn every_anchor_comes_once_over_ranks_on_one_gpu_and_the_ring_is_deep_enough_for_bursts() {
    let daemon = serve(&[]);
    let mut seen: Vec<u64> = Vec::new();
    let mut loaders: Vec<_> = (0..4)
        .map(|rank| {
            let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).rank(rank, 4);
            builder.device(device()).connect().unwrap()
        })
        .collect();
    assert!(
        loaders.iter().all(|loader| loader.info().slots == 64),
        "two bursts of 30, and 4 that a client may hold"
    );
    loop {
        let batches: Vec<_> = loaders.iter_mut().map(|loader| loader.next_batch().unwrap()).collect();
        if batches.iter().all(Option::is_none) {
            break;
        }
        seen.extend(batches.iter().flatten().flat_map(Batch::ids));
    }
    seen.sort_unstable();
    assert!(seen == (0..35_965).collect::<Vec<_>>());
    let status = daemon.status();
    let (batches, bursts) = (&status["gpus"][0]["batches"], &status["gpus"][0]["bursts"]);
    assert!(bursts.as_u64() < batches.as_u64(), "{batches} batches in {bursts} bursts");
}

#[test]
fn four_batches_that_a_client_holds_do_not_hold_up_a_burst() {
    let daemon = serve(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).batch_size(64).device(device());
    let mut loader = builder.connect().unwrap();
    let mut held: Vec<_> = (0..34).map(|_| loader.next_batch().unwrap().unwrap()).collect();
    held.drain(..30);
    let ready = || daemon.status()["loaders"][0]["slots"]["ready"].as_u64();
    daemon.wait_until("all slots but those held are ready", || ready() == Some(60));
}

#[test]
fn no_slot_is_written_while_its_reader_is_not_done() {
    if !is_simulated() {
        return; // a real trainer's streams: client/python/tests/test_cuda_soak.py
    }
    let daemon = serve(&[]);
    let found = Arc::new(Mutex::default());
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).device(device()).shuffle(true);
    let mut loader = builder.late_reads(Duration::from_millis(3), Arc::clone(&found)).connect().unwrap();
    let mut held = std::collections::VecDeque::new();
    let mut random = 0x9e37_79b9_u64;
    for _ in 0..3 {
        while let Some(batch) = loader.next_batch().unwrap() {
            batch.use_on(robocache::gpu::Stream::LEGACY).unwrap();
            held.push_back(batch);
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            while held.len() > usize::try_from(random >> 60).unwrap() {
                held.pop_front();
            }
        }
    }
    held.clear();
    drop(loader);
    let found = found.lock().unwrap();
    assert!(found.checked > 1000, "{found:?}");
    assert!(found.overwritten.is_empty(), "{found:?}");
}

#[test]
fn a_client_that_holds_every_slot_is_told_so() {
    let daemon = serve(&[]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).device(device()).slots(80);
    let mut loader = builder.connect().unwrap();
    let held: Vec<_> = (0..80).map(|_| loader.next_batch().unwrap().unwrap()).collect();
    let error = loader.next_batch().unwrap_err();
    assert!(matches!(error, LoaderError::AllSlotsHeld { slots: 80 }), "{error}");
    drop(held);
    assert_eq!(loader.next_batch().unwrap().unwrap().ids()[0], 80 * 64);
}

#[test]
fn devices_that_are_not_there_are_refused_with_what_is() {
    let daemon = serve(&[]);
    let refused = |device: &str| {
        let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).device(device);
        match builder.connect() {
            Err(ConnectError::Refused { message, .. }) => message,
            Err(other) => other.to_string(),
            Ok(_) => panic!("{device} was served"),
        }
    };
    assert!(refused("sim:7").contains("sim:7"), "{}", refused("sim:7"));
    assert!(refused("tpu").contains("cuda"), "{}", refused("tpu"));
    let unknown = refused("cuda:GPU-00000000-0000-0000-0000-000000000000");
    assert!(unknown.contains("driver") || unknown.contains("not one of"), "{unknown}");
}

#[test]
fn a_gpu_that_breaks_takes_its_own_loaders_and_nothing_else() {
    let daemon = Daemon::start_with_fault("launch=20", &["--simulate-gpus", "2"]);
    let build = |device: &str| daemon.loader(data("g1_v30_conv")).features(["action"]).device(device);
    let (mut breaks, mut other, mut on_cpu) = (
        build("sim:0").connect().unwrap(),
        build("sim:1").connect().unwrap(),
        build("cpu").connect().unwrap(),
    );
    let wanted: Vec<_> = (0..40).map(|_| whole(&on_cpu.next_batch().unwrap().unwrap())).collect();
    let mut seen = 0;
    let error = loop {
        match breaks.next_batch() {
            Ok(batch) => {
                assert_eq!(whole(&batch.unwrap()), wanted[seen], "what was made before is good");
                seen += 1;
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, LoaderError::Failed { message, .. } if message.contains("lost")), "{error}");
    assert!(seen < 40);
    for wanted in &wanted {
        assert_eq!(whole(&other.next_batch().unwrap().unwrap()), *wanted);
    }
    on_cpu.next_batch().unwrap().unwrap();
    let refused = build("sim:0").connect().unwrap_err().to_string();
    assert!(refused.contains("lost") && refused.contains("restart"), "{refused}");
}

#[test]
fn a_ring_that_does_not_fit_the_gpu_is_made_smaller_with_a_warning() {
    let daemon = Daemon::start_with_fault("allocations=2", &["--simulate-gpus", "1"]);
    let builder = daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true).device("sim:0");
    let mut loader = builder.connect().unwrap();
    assert_eq!(loader.info().slots, 16, "64 and 32 found no memory");
    assert_eq!((&mut loader).map(Result::unwrap).count(), 562);
    assert!(daemon.log().contains("making it smaller"), "{}", daemon.log());
}

#[test]
fn loaders_for_cpus_and_gpus_share_one_daemon_and_decode_once() {
    let daemon = serve(&[]);
    let build = || daemon.loader(data("g1_v30_conv")).features(["action"]).shuffle(true);
    let mut on_cpu = build().connect().unwrap();
    let mut on_gpu = build().device(device()).connect().unwrap();
    for _ in 0..100 {
        let (a, b) = (on_cpu.next_batch().unwrap().unwrap(), on_gpu.next_batch().unwrap().unwrap());
        assert_eq!(whole(&a), whole(&b));
    }
    drop((on_cpu, on_gpu));
    let read = daemon.status()["store"]["bytes_decoded"].as_u64().unwrap();
    assert_eq!(read, 35_965 * (26 * 4 + 4 * 8 + 4));
}
