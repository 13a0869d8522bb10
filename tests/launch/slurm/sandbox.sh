#!/usr/bin/env bash
# A real Slurm of two hosts (n1 and n2, each with 2 CPUs and 2 pretended GPUs) on one machine, for tests of job files.
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#   sandbox.sh up DIR          The hosts are network and UTS namespaces. Partitions: main, and urgent, which preempts it.
#   sandbox.sh run DIR CMD...  Runs a Slurm command on the controller: sandbox.sh run DIR sbatch --parsable job.sh
#   sandbox.sh down DIR        Ends what `up` started, by process id, and removes the namespaces.
# Needs root. DIR is an absolute path of its own. `ip netns exec` hides /sys/fs/cgroup, so the daemons are entered with
# nsenter, in a mount namespace of their own. A GPU needs a File= line; any file will do.
set -eu
what=$1 D=$2
shift 2
tag=$(printf %s "$D" | cksum | cut -c1-4)
C=s${tag}c A=s${tag}a B=s${tag}b
conf=$D/etc/slurm.conf

enter() { # enter NAMESPACE HOSTNAME COMMAND...: in this host's network, with its name and its /etc/hosts
  local ns=$1 host=$2
  shift 2
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/$ns" unshare --uts --mount bash -c '
    mount --make-rprivate /
    mount --bind "$1/etc/hosts" /etc/hosts
    hostname "$2"
    dir=$1
    shift 2
    cd "$dir"
    exec "$@"' _ "$D" "$host" "$@"
}

up() {
  mkdir -p "$D"/{etc,state,log,munge,spool/n1,spool/n2}
  touch "$D/gpu0" "$D/gpu1"
  printf '127.0.0.1 localhost\n10.78.0.1 ctl\n10.78.0.2 n1\n10.78.0.3 n2\n' >"$D/etc/hosts"
  echo "NodeName=n[1-2] Name=gpu File=$D/gpu[0-1]" >"$D/etc/gres.conf"
  # A job that was requeued waits as long as a credential is valid (cred_expire), by default two minutes.
  cat >"$conf" <<EOF
ClusterName=sandbox
SlurmctldHost=ctl(10.78.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/ctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/ctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeAddr=10.78.0.2 NodeHostname=n1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN Gres=gpu:2 RealMemory=1000 Feature=fast
NodeName=n2 NodeAddr=10.78.0.3 NodeHostname=n2 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN Gres=gpu:2 RealMemory=1000 Feature=slow
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
EOF
  for ns in "$C" "$A" "$B"; do
    ip netns add "$ns"
    ip -n "$ns" link set lo up
  done
  ip -n "$C" link add br0 type bridge
  ip -n "$C" addr add 10.78.0.1/24 dev br0
  ip -n "$C" link set br0 up
  i=2
  for ns in "$A" "$B"; do
    ip link add "v$tag$i" netns "$C" type veth peer name eth0 netns "$ns"
    ip -n "$C" link set "v$tag$i" master br0 up
    ip -n "$ns" addr add "10.78.0.$i/24" dev eth0
    ip -n "$ns" link set eth0 up
    i=$((i + 1))
  done
  dd if=/dev/urandom of="$D/munge/munge.key" bs=1024 count=1 2>/dev/null
  chmod 400 "$D/munge/munge.key"
  chmod 711 "$D" "$D/munge"
  munged --force --key-file="$D/munge/munge.key" --socket="$D/munge/munge.socket" \
    --pid-file="$D/munge/munged.pid" --log-file="$D/munge/munged.log" --seed-file="$D/munge/seed"
  export SLURM_CONF=$conf
  enter "$C" ctl slurmctld -D -f "$conf" -c >"$D/log/ctld.out" 2>&1 &
  echo $! >"$D/pids"
  sleep 2
  enter "$A" n1 slurmd -D -f "$conf" -N n1 >"$D/log/n1.out" 2>&1 &
  echo $! >>"$D/pids"
  enter "$B" n2 slurmd -D -f "$conf" -N n2 >"$D/log/n2.out" 2>&1 &
  echo $! >>"$D/pids"
  for _ in $(seq 90); do
    if [ "$(enter "$C" ctl sinfo -h -p main -t idle -o %D 2>/dev/null)" = 2 ]; then
      return
    fi
    sleep 1
  done
  enter "$C" ctl sinfo
  tail -n 5 "$D"/log/*
  exit 1
}

down() {
  # The processes of jobs would outlive the daemons.
  SLURM_CONF=$conf enter "$C" ctl timeout 10 scancel --user=root --full --signal=KILL 2>/dev/null || true
  sleep 1
  for file in "$D"/pids "$D"/*.pid "$D"/munge/munged.pid; do
    while read -r pid; do
      kill "$pid" 2>/dev/null || true
    done <"$file" 2>/dev/null || true
  done
  sleep 1
  for ns in "$C" "$A" "$B"; do
    ip netns del "$ns" 2>/dev/null || true
  done
}

case $what in
  up) up ;;
  run)
    export SLURM_CONF=$conf
    enter "$C" ctl "$@"
    ;;
  down) down ;;
  *)
    echo "use up, run or down" >&2
    exit 2
    ;;
esac
