#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests: slurmctld, slurmd and munged of Debian's packages, as root.
#
#   scripts/slurm_node.sh start FOLDER     prints `export SLURM_CONF=...` when the node is idle; eval it
#   scripts/slurm_node.sh stop FOLDER
#   scripts/slurm_node.sh install          apt-get install slurm-wlm munge
#
# Partition `main` is the default; jobs of `urgent` pre-empt its jobs, which are queued again.
set -euo pipefail
[[ ${1:-} =~ ^(start|stop|install)$ && ( $1 == install || -n ${2:-} ) ]] || { sed -n 's/^# \?//p' "$0" | sed -n 2,99p; exit 2; }
if [[ $1 == install ]]; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm munge
  exit
fi
mkdir -p "$2" && cd "$2"
export SLURM_CONF=$PWD/slurm.conf
if [[ $1 == stop ]]; then
  scancel --me 2> /dev/null || true
  for _ in {1..60}; do [[ -n $(squeue --noheader 2> /dev/null) ]] || break; sleep 0.5; done  # slurmd would wait for them
  for daemon in slurmctld slurmd munged; do
    [[ ! -f $daemon.pid ]] || kill "$(< $daemon.pid)" 2> /dev/null || true
  done
  exit
fi
ports=$(python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "12"]; print(*(x.getsockname()[1] for x in s))')
mkdir -p state spool
cat > slurm.conf << END
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=${ports% *}
SlurmdPort=${ports#* }
AuthType=auth/munge
AuthInfo=socket=$PWD/munge.socket,cred_expire=5  # jobs that are queued again wait for so many seconds
StateSaveLocation=$PWD/state
SlurmdSpoolDir=$PWD/spool
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/slurmd.pid
SlurmctldLogFile=$PWD/slurmctld.log
SlurmdLogFile=$PWD/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=20
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime=00:00:00
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=${SLURM_NODE_CPUS:-4}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
END
[[ -f key ]] || { (umask 077; head -c 1024 /dev/urandom > key); }
munged --force --key-file="$PWD/key" --socket="$PWD/munge.socket" --pid-file="$PWD/munged.pid" --log-file="$PWD/munged.log" \
  --seed-file="$PWD/seed"
slurmctld
slurmd
for _ in {1..60}; do
  if sinfo --noheader --format=%T 2> /dev/null | grep -q idle; then
    echo "export SLURM_CONF=$SLURM_CONF"
    exit
  fi
  sleep 0.5
done
echo "the node did not become idle within 30 s; logs are in $PWD" >&2
tail -n 5 slurmctld.log slurmd.log >&2
exit 1
